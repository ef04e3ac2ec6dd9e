"""Infrastructure that fails under episodes: nothing is scored for it, and the next run ends as if it had not been."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill.agents import make_agent
from ragdistill.envs.pool import EnvPool
from ragdistill.journal import Journal
from ragdistill.llm import ChatModel, Sampling
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import AgentParams
from ragdistill.records import Message, StopReason, Task, Trajectory
from ragdistill.rollout import Setting, play_all
from ragdistill.stages.track import RECEIPT
from tests.faults.conftest import Figure
from tests.faults.outcome import registered, tracked
from tests.faults.project import entries, fresh, run
from tests.faults.test_refusals import OPENVINO
from tests.faults.toy import Slow

LIMITS = AgentParams(
    name="react", context_tokens=4000, max_reply_tokens=20, loop_limit=3, no_action_limit=2, examples=0
)
TASKS = [Task(id=f"t{i}", env="toy", split="train", kind="k", group="g", data="", sha256=str(i)) for i in range(16)]


def answer(messages: Sequence[Message], sampling: Sampling) -> str:
    return f"Thought: I go.\nAction: poke {sampling.seed % 97}"


def play(
    root: Path, model: ChatModel, trouble: Callable[[EnvPool], object] | None = None, timeout: float = 30.0,
    tasks: Sequence[Task] = TASKS,
) -> list[Trajectory]:  # fmt: skip
    """`tasks` on two real worker processes, while `trouble(pool)` is called every 0.1 s."""
    setting = Setting(
        policy="base", run="0", agent=make_agent("react"), limits=LIMITS, max_steps=8, temperature=0.7,
        environment="toy", model="toy",
    )  # fmt: skip

    async def harass(pool: EnvPool) -> None:
        while trouble:
            await asyncio.sleep(0.1)
            trouble(pool)

    async def main() -> list[Trajectory]:
        pool = EnvPool(Slow, workers=2, slots=4, timeout=timeout)
        torment = asyncio.create_task(harass(pool))
        try:
            return await play_all([(t, 0) for t in tasks], setting, model, pool, Journal(root, Trajectory), 8)
        finally:
            torment.cancel()
            await pool.close()

    return asyncio.run(main())


def timeless(done: Sequence[Trajectory]) -> list[Trajectory]:
    return [msgspec.structs.replace(t, seconds=0.0) for t in done]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    return timeless(play(tmp_path_factory.mktemp("clean"), ScriptedModel(answer, "toy")))


@pytest.mark.parametrize(("blow", "timeout"), [(signal.SIGKILL, 30.0), (signal.SIGSTOP, 4.0)], ids=["dead", "hanging"])
def test_workers_that_die_or_hang_cost_no_episode(
    undisturbed: list[Trajectory], tmp_path: Path, figure: Figure, blow: signal.Signals, timeout: float
) -> None:
    rng, struck = random.Random(7), []

    def trouble(pool: EnvPool) -> None:
        if len(struck) < (4 if blow is signal.SIGKILL else 2) and pool.pids and rng.random() < 0.5:
            struck.append(victim := rng.choice(pool.pids))
            with suppress(ProcessLookupError):
                os.kill(victim, blow)

    model = ScriptedModel(answer, "toy")
    first = play(tmp_path, model, trouble, timeout)
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*.json")}
    lost = [t for t in first if t.stop is StopReason.INFRA_ERROR]
    assert struck, "no worker was struck"
    assert len(finished) == len(first) - len(lost)
    again = play(tmp_path, model)
    assert timeless(again) == undisturbed
    assert all(p.stat().st_mtime_ns == at for p, at in finished.items()), "a finished episode was played again"
    figure(
        f"worker {'killed' if blow is signal.SIGKILL else 'stopped'} x{len(struck)}",
        f"{len(lost)} of {len(first)} episodes left to the next run, 0 scored as failures; then equal to undisturbed",
    )


class Meagre:
    """Something whose `step` fails at some of its calls, and is otherwise as before."""

    def __init__(self, inner: Any, calls: Iterator[int], failing: dict[int, Callable[[], object]]) -> None:
        self._inner, self._calls, self._failing = inner, calls, failing

    def step(self, *args: object) -> object:
        self._failing.pop(next(self._calls), lambda: None)()
        return self._inner.step(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def too_much() -> None:
    """What PyTorch says on this machine."""
    import torch

    torch.empty(10**15)


def refuse(error: Exception) -> Callable[[], None]:
    def blow() -> None:
        raise error

    return blow


def engine_of(kind: str, where: Path, failing: dict[int, Callable[[], object]]) -> Any:
    """A local engine on the toy model whose steps fail as `failing` says, in float32, so that replies can be equal."""
    from tests.llm_toys import toy_model

    model, calls = toy_model(where / "model"), iter(range(1, 10**9))
    if kind == "openvino":
        from ragdistill.llm import openvino as room

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "best_dtype", lambda: "float32")
            engine: Any = room.OpenVinoEngine(model, None, 8, where / "gguf")
        load = engine._load
        engine._load = lambda: Meagre(load(), calls, failing)
        engine._pipeline = Meagre(engine._pipeline, calls, failing)
        return engine
    from ragdistill.llm.local import LocalEngine

    engine = LocalEngine(model, dtype="float32", max_batch=8, reference=kind == "reference")
    engine._runner = Meagre(engine._runner, calls, failing)
    return engine


ENGINES = [
    "reference", "batched",
    pytest.param("openvino", marks=pytest.mark.skipif(not find_spec("openvino_genai"), reason="not installed")),
]  # fmt: skip


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_out_of_memory_in_a_step_costs_no_episode(tmp_path: Path, figure: Figure, kind: str) -> None:
    said = refuse(RuntimeError(OPENVINO)) if kind == "openvino" else too_much
    results: list[list[Trajectory]] = []
    blows: dict[int, Callable[[], object]] = {3: said, 20: refuse(MemoryError("out of memory"))}
    for name, failing in (("undisturbed", {}), ("short", blows)):
        engine = engine_of(kind, tmp_path, failing)
        try:
            results.append(timeless(play(tmp_path / name, engine, tasks=TASKS[:4])))
        finally:
            engine.close()
    assert not blows, "a step that should have failed was never made"
    assert not [t for t in results[1] if t.stop is StopReason.INFRA_ERROR]
    assert results[0] == results[1]
    assert len({s.reply for t in results[0] for s in t.steps}) > 4, "it says something"
    figure(f"{kind} engine out of memory, 2 steps", f"{len(results[1])} of 4 episodes equal to undisturbed, 0 lost")


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_that_stays_out_of_memory_names_what_takes_less(tmp_path: Path, kind: str) -> None:
    said = refuse(RuntimeError(OPENVINO)) if kind == "openvino" else too_much
    engine = engine_of(kind, tmp_path, dict.fromkeys(range(1, 1000), said))
    try:
        lost = play(tmp_path / "journal", engine, tasks=TASKS[:2])
    finally:
        engine.close()
    assert {t.stop for t in lost} == {StopReason.INFRA_ERROR} and not list(tmp_path.glob("journal/*/*.json"))
    assert all("had not enough memory for a step (" in t.error for t in lost)
    assert all(t.error.endswith("; lower model.concurrency") for t in lost), lost[0].error


JUMPING = """
import random, runpy, sys, time
real, rng = time.time, random.Random(3)
time.time = lambda: real() + rng.choice((-1e9, -86400.0, -1.0, 0.0, 3600.0, 1e9))
time.time_ns = lambda: int(time.time() * 1e9)
module = sys.argv.pop(1)
runpy.run_module("ragdistill.stages." + module, run_name="__main__")
"""


@pytest.mark.timeout(300)
def test_a_clock_that_jumps_changes_nothing(small: Path, tmp_path: Path, figure: Figure) -> None:
    project = fresh(small, tmp_path / "project")
    for i, path in enumerate(p for p in project.rglob("*") if p.is_file() and ".git/" not in str(p)):
        os.utime(path, (0, 0) if i % 2 else (4e9, 4e9))  # files of 1970 and of 2096
    done = run(project, "-c", JUMPING, "rollouts")
    assert done.returncode == 0, done.stderr
    played = Path("data/rollouts.jsonl")
    expected, found = (
        [msgspec.json.decode(line, type=Trajectory) for line in (p / played).read_bytes().splitlines()]
        for p in (small, project)
    )
    assert timeless(found) == timeless(expected)
    assert all(0 <= t.seconds < 300 for t in found)
    assert len(entries(project)) == len(found)
    figure("clock jumps by years", f"{len(found)} of {len(found)} episodes equal, 0 negative times")


@pytest.mark.timeout(300)
def test_a_clock_that_jumps_registers_nothing_twice(small: Path, tmp_path: Path, figure: Figure) -> None:
    """MLflow orders what it holds by time: the run is found again all the same, and so is the version."""
    project = tracked(small, tmp_path / "project")
    for command in (("-c", JUMPING, "track"), ("-c", JUMPING, "track"), ("-m", "ragdistill.stages.track")):
        (project / "mlruns" / RECEIPT).unlink(missing_ok=True)
        done = run(project, *command)
        assert done.returncode == 0, done.stderr
        assert "ragdistill-student version 1 (" in done.stdout
    assert registered(project) == [1, 1]
    figure("clock jumps under MLflow", "3 projections: 1 run, 1 model version")
