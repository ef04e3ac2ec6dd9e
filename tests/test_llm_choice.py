"""Which engine plays is known before anything is computed, and is one for all policies that are compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill import checks, doctor, profiles
from ragdistill.errors import ConfigError
from ragdistill.llm import choice, context_limit, engine_of
from ragdistill.llm.choice import choose
from ragdistill.llm.weights import model_fingerprint, save_merged, write_base_identity
from ragdistill.params import Params, load_params
from ragdistill.stages import base as base_stage
from ragdistill.stages.playing import open_model
from tests.llm_toys import toy_model
from tests.misbehaving import KEY

import torch  # isort: skip  (after the toys, which prepare the process)
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config  # isort: skip

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
SCALED: Any = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("models") / "raw")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend what is installed and plugged in."""

    def pretend(openvino: bool, cuda: bool) -> None:
        monkeypatch.setattr(choice, "has_openvino", lambda: openvino)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)

    return pretend


def with_config(toy: Path, place: Path, config: Any) -> Path:
    """A model directory as the choice sees it: configuration and tokenizer."""
    config.save_pretrained(place)
    (place / "tokenizer.json").write_bytes((toy / "tokenizer.json").read_bytes())
    return place


@pytest.mark.parametrize(
    ("openvino", "cuda", "dtype", "expected", "says"),
    [
        (True, False, "auto", ("openvino", "cpu"), "no CUDA device, and it can run this llama model"),
        (False, False, "auto", ("batched", "cpu"), "openvino-genai is not installed"),
        (True, False, "float32", ("batched", "cpu"), "model.dtype is float32"),
        (True, True, "auto", ("batched", "cuda"), "there is a CUDA device"),
        (False, True, "bfloat16", ("batched", "cuda"), "there is a CUDA device"),
    ],
)
def test_auto_takes_cuda_then_openvino_then_torch_and_says_why(
    toy: Path, machine: Any, openvino: bool, cuda: bool, dtype: str, expected: tuple[str, str], says: str
) -> None:
    machine(openvino, cuda)
    found = choose("auto", dtype, toy)
    assert (found.engine, found.device) == expected
    assert says in str(found) and "\n" not in str(found)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Qwen2Config(**SIZES), "not this qwen2 one"),
        (LlamaConfig(**SIZES, rope_parameters=SCALED), "unscaled rotary positions"),
        (LlamaConfig(**SIZES, attention_bias=True), "no biases"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "SiLU"),
    ],
    ids=["qwen", "scaled positions", "biases", "gelu"],
)
def test_what_openvino_would_get_wrong_goes_to_torch_and_is_refused_by_name(
    toy: Path, tmp_path: Path, machine: Any, config: Any, says: str
) -> None:
    machine(openvino=True, cuda=False)
    place = with_config(toy, tmp_path, config)
    found = choose("auto", "auto", place)
    assert (found.engine, found.device) == ("batched", "cpu") and says in found.reason
    with pytest.raises(ConfigError, match="set it to auto"):
        choose("openvino", "auto", place)


def test_a_tokenizer_that_openvino_cannot_read_goes_to_torch(toy: Path, tmp_path: Path, machine: Any) -> None:
    machine(openvino=True, cuda=False)
    place = with_config(toy, tmp_path, LlamaConfig(**SIZES))
    assert choose("auto", "auto", place).engine == "openvino"
    (place / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    assert "byte-pair" in choose("auto", "auto", place).reason


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        MistralConfig(**SIZES, sliding_window=8),
    ],
    ids=["mixed layers", "one window"],
)
def test_what_no_engine_can_run_is_refused_from_its_configuration(
    toy: Path, tmp_path: Path, machine: Any, config: Any, cuda: bool
) -> None:
    machine(openvino=True, cuda=cuda)
    place = with_config(toy, tmp_path, config)
    for engine in ("auto", "batched", "reference"):
        with pytest.raises(ConfigError, match=r"sliding_attention.*endpoint"):
            choose(engine, "auto", place)


def changed(**model: Any) -> Params:
    params = load_params(ROOT / "params.yaml")
    return msgspec.structs.replace(params, model=msgspec.structs.replace(params.model, **model))


def test_the_first_stage_names_the_engine_and_refuses_before_anything_is_trained(
    toy: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(openvino=True, cuda=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path / "cache"))
    assert "base played by OpenVINO on the CPU" in base_stage.body(changed(base=str(toy)))
    scaled = toy_model(tmp_path / "scaled")
    LlamaConfig.from_pretrained(scaled, rope_parameters=SCALED).save_pretrained(str(scaled))
    said = base_stage.body(changed(base=str(toy), teacher=str(scaled)))
    assert "base played by OpenVINO" in said and "teacher played by torch (batched) on the CPU" in said
    with pytest.raises(ConfigError, match="is openvino, but"):
        base_stage.body(changed(base=str(scaled), engine="openvino"))


@pytest.mark.parametrize(
    ("has", "key", "change", "says"),
    [
        ((False, True), KEY, {}, "needs a CUDA device"),
        ((True, False), KEY, {}, "needs the package bitsandbytes; `pip install bitsandbytes`"),
        ((True, True), "", {}, "OPENAI_API_KEY is not set"),
        ((False, False), KEY, {"sft": {"variants": ()}}, None),
        ((True, True), "", {"hints": {"extractor": "offline"}}, None),
        ((True, True), KEY, {}, None),
    ],
    ids=["cpu", "package", "key", "no students", "no hints by GPT-4o", "all there"],
)
def test_what_a_cell_of_the_paper_needs_is_asked_for_before_anything_is_played(
    toy: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch, has: tuple[bool, bool], key: str,
    change: dict[str, Any], says: str | None,
) -> None:  # fmt: skip
    cuda, package = has
    machine(openvino=True, cuda=cuda)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "find_spec", lambda name: object() if package else None)
    monkeypatch.setattr(doctor, "_answer", lambda *_: "H200, 1 MiB" if cuda else None)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    params = profiles.overlaid("paper-alfworld-7b-react", ROOT / "params.yaml", ROOT / "profiles")
    for section, values in {"model": {"base": str(toy)}, **change}.items():
        new = msgspec.structs.replace(getattr(params, section), **values)
        params = msgspec.structs.replace(params, **{section: new})
    monkeypatch.setattr(doctor, "load_params", lambda _: params)
    found = doctor.check_needs(tmp_path)
    if says is None:
        base_stage.body(params)
        assert found.status == "ok"
    else:
        with pytest.raises(ConfigError, match=says):
            base_stage.body(params)
        assert not Path("models").exists() and found.status == "missing" and found.fix


def test_a_model_of_symbolic_links_arrives_as_files_like_any_other(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.file_download import _create_symlink

    monkeypatch.chdir(tmp_path)
    blobs, snapshot = (tmp_path / "hub/models--owner--name" / place for place in ("blobs", "snapshots/1a2b"))
    shutil.copytree(toy, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():  # as snapshot_download lays it out
        _create_symlink(str(blob), str(snapshot / blob.name))
    base_stage.body(changed(base=str(snapshot)))
    assert model_fingerprint(Path("models/raw")) == model_fingerprint(toy)
    assert not any(path.is_symlink() for path in Path("models/raw").iterdir())


def students_of(toy: Path, place: Path) -> tuple[Path, Path]:
    """(cold-started base, adapter of a student on it)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    for name, on in (("coldstart", toy), ("student", place / "base")):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(on), LoraConfig(r=2, target_modules="all-linear"))
        model.save_pretrained(str(place / name))
        write_base_identity(place / name, on)
        made.append(save_merged(toy, place / name, place / "base", "base") if name == "coldstart" else place / name)
    return made[0], made[1]


@pytest.mark.parametrize("installed", [True, False], ids=["openvino", "torch"])
def test_the_engine_holds_what_the_agent_may_fill_and_the_model_was_made_for(
    toy: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if installed and not choice.has_openvino():
        pytest.skip("openvino-genai is not installed")
    machine(openvino=installed, cuda=False)
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path / "cache"))
    made_for = json.loads((toy / "config.json").read_text())["max_position_embeddings"]
    params, held = changed(concurrency=2), {}
    for most in (made_for - 100, made_for - 50, 10 * made_for):
        agent = msgspec.structs.replace(params.agent, context_tokens=most)
        for context in (0, made_for - 20):
            model = open_model(msgspec.structs.replace(params, agent=agent), toy, context=context)
            held[most, context] = context_limit(model)
            model.close()
    assert held == {(most, own): min(max(most, own), made_for) for most, own in held}


@pytest.mark.parametrize("installed", [True, False], ids=["openvino", "torch"])
def test_all_policies_of_an_evaluation_share_engine_and_precision(
    toy: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch, installed: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if installed and not choice.has_openvino():
        pytest.skip("openvino-genai is not installed")
    machine(openvino=installed, cuda=False)
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path / "cache"))
    base, student = students_of(toy, tmp_path)
    said: set[str] = set()
    policies = {"raw": (toy, None), "base": (base, None), "distilled": (base, student)}
    for name, (directory, adapter) in policies.items():
        model = open_model(changed(concurrency=2), directory, adapter)
        said.add(engine_of(model).words())
        policies[name] = (directory, Path(model.fingerprint()))
        model.close()
    assert len(said) == 1 and ("OpenVINO" if installed else "transformers, batched") in said.pop()
    assert len({fingerprint for _, fingerprint in policies.values()}) == 3, "three models they are"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("engine for ")]
    assert len(lines) == 3 and len({line.split(": ", 1)[1] for line in lines}) == 1
