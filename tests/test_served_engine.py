"""The endpoint's client against a server that is no fake: `ragdistill serve` on OpenVINO, as a process of its own.

Episodes of the real environment and hints by a model go through it. With a toy that was taught some words, and with
the project's own model where the pipeline has made it.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from ragdistill.commands.smoke import override
from ragdistill.envs import defaults_of, identity_of, make_domain
from ragdistill.hints.extract import extract
from ragdistill.llm.endpoint import EndpointModel
from ragdistill.params import Params, load_params
from ragdistill.records import StopReason, Task, Trajectory, read_json, write_json
from ragdistill.stages.advising import asker
from ragdistill.stages.common import GAMES, IDENTITY
from ragdistill.stages.playing import open_model, play
from tests.serving_toys import taught_model
from tests.test_serve import end, start

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("openvino_genai") is None, reason="openvino-genai is not installed"),
]


def weights(kind: str, where: Path) -> None:
    """The model to serve, as `models/base` below `where`."""
    base = where / "models/base"
    if kind == "toy":
        config = taught_model(base, 32) / "config.json"
        write_json(config, read_json(config) | {"max_position_embeddings": 8192})  # rotary: nothing was learnt of it
    elif (own := ROOT / "models/base").is_dir():
        base.parent.mkdir()
        shutil.copytree(own, base)
    else:
        pytest.skip("the pipeline has made no models/base")


@pytest.fixture(params=["toy", "own"])
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Params]:
    """A folder that plays through the server, with two tasks; its parameters."""
    weights(request.param, tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    settings = ["model.engine=openvino", "model.concurrency=1", f"env.max_steps={STEPS}", "env.workers=1"]
    override(tmp_path / "params.yaml", settings)
    process, url = start(tmp_path)
    try:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("DVC_ROOT", raising=False)
        monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path / "cache"))
        override(tmp_path / "params.yaml", [
            "model.engine=endpoint", f"endpoint.base_url={url}", "endpoint.model=base", "endpoint.api_key_env=null",
            "endpoint.budget=null", "endpoint.tokenizer=models/base", "endpoint.max_concurrency=1",
            "hints.extractor=llm", "hints.llm.mode=single", "sft.variants=[]", "evaluate.policies=[base]",
        ])  # fmt: skip
        yield load_params()
    finally:
        code, out, err = end(process, signal.SIGINT)
    assert (code, out, err) == (0, "stopped.\n", "")


def played(params: Params, tasks: list[Task]) -> list[Trajectory]:
    return play(params, "base", "rollouts", [(t, 0) for t in tasks], open_model(params, Path("models/base")), 0.0)


def test_episodes_and_hints_go_through_a_real_server(served: Params, tmp_path: Path) -> None:
    domain = make_domain(served.env)
    write_json(IDENTITY, {"environment": identity_of(domain, served.env)})
    made, hard = domain.tasks("train", 6, 0, GAMES / "train"), defaults_of(domain).primary
    tasks = [t for t in made if t.kind in hard][:2]  # hints come from failures

    there = played(served, tasks)
    override(tmp_path / "params.yaml", ["model.engine=openvino"])
    here = played(load_params(), tasks)
    assert [[s.reply for s in t.steps] for t in there] == [[s.reply for s in t.steps] for t in here]
    assert [t.stop for t in there] == [t.stop for t in here]
    assert all(t.steps and t.usage.billed == h.usage.billed for t, h in zip(there, here, strict=True))
    assert not [t for t in there if t.stop in (StopReason.INFRA_ERROR, StopReason.BAD_REPLY) or t.success]
    assert played(served, tasks) == there, "from the journal"

    model = open_model(served, Path("models/base"))
    assert isinstance(model, EndpointModel)
    paid = asker(served, model)
    found = asyncio.run(extract(there, paid, served.hints, 0))
    model.close()
    account = found.account
    assert account.cases == 2 and account.usage.completion_tokens > 0
    assert account.cases <= paid.calls == model.account.paid_calls <= 2 * account.cases
    assert model.account.failed_attempts == 1, "asked once for a reply that follows a schema, which it cannot give"
    assert account.proposed + account.unusable == len(found.hints) + len(found.quarantined) > 0
    assert all(q.reason for q in found.quarantined)
