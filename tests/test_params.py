"""Parameters: what is shipped loads, and every mistake is one sentence that names the key."""

from __future__ import annotations

import copy
from functools import reduce
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from ragdistill import profiles
from ragdistill.commands.smoke import override
from ragdistill.errors import ConfigError
from ragdistill.files import write_atomic
from ragdistill.params import Params, Section, convert_params, load_params

FILE = Path(__file__).resolve().parents[1] / "params.yaml"

TRAINING = yaml.safe_load(FILE.read_text())["training"]


def changed(key: str, value: Any) -> dict[str, Any]:
    """`params.yaml` with the dotted `key` set."""
    raw = copy.deepcopy(yaml.safe_load(FILE.read_text()))
    *parents, last = key.split(".")
    section = raw
    for name in parents:
        section = section[name]
    section[last] = value
    return raw


def test_the_shipped_parameters_load_and_lose_nothing() -> None:
    assert msgspec.json.decode(msgspec.json.encode(load_params(FILE))) == yaml.safe_load(FILE.read_text())


def test_every_parameter_says_why_at_the_end_of_its_line() -> None:
    lines = [line for line in FILE.read_text().splitlines() if line.startswith(("  ", "seed", "label"))]
    bare = [line for line in lines if "#" not in line and "lora:" not in line]
    assert not bare


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lable", "label"),
        ("evn", "env"),
        ("hints.dedupe", "dedup"),
        ("agent.contexttokens", "context_tokens"),
        ("sft.lora.dropot", "dropout"),
        ("coldstart.lora.alhpa", "alpha"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_valid_one(key: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert_params(changed(key, 1))
    assert f"`{key}`" in str(caught.value)
    assert f"nearest valid key is `{near}`" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hints.k", "3"),
        ("hints.k", 2.5),
        ("hints.k", True),
        ("hints.k", -1),
        ("env.workers", 0),
        ("env.step_timeout", 0),
        ("coldstart.plain", 1.1),
        ("report.confidence", -0.1),
        ("sft.lora.lr", "1e-3"),
        ("sft.lora.lr", 0),
        ("sft.seeds", ["0"]),
        ("sft.seeds", [0, -1]),
        ("sft.seeds", [2**32]),
        ("seed", -5),
        ("model.engine", "triton"),
        ("teach.variants", ["hint"]),
        ("agent.loop_limit", 1),
        ("strip.max_invalid", -1),
        ("strip.min_score", 67),
        ("agent.examples", -1),
        ("label", None),
    ],
)
def test_a_wrong_type_or_range_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        convert_params(changed(key, value), "params.yaml")
    assert str(caught.value).startswith("params.yaml: ")
    assert f"$.{key}" in str(caught.value)


@pytest.mark.parametrize(("section", "key"), [("model", "teacher"), ("hints", "ranker_model")])
def test_a_budget_without_prices_is_refused_once_the_endpoint_is_used(section: str, key: str) -> None:
    raw = changed("endpoint.prices", {"prompt": 0.0, "cached": 0.0, "completion": 0.0})
    raw["hints"]["ranker"] = "llm"
    convert_params(raw)
    raw[section][key] = "endpoint"
    with pytest.raises(ConfigError, match=r"endpoint\.budget cannot be kept"):
        convert_params(raw)
    raw["endpoint"]["budget"] = None
    convert_params(raw)


def test_students_that_a_served_model_could_not_play_are_refused_before_anything_is_paid() -> None:
    raw = changed("model.engine", "endpoint")
    with pytest.raises(ConfigError, match=r"model\.engine is endpoint, but .*sft\.variants.*model\.teacher: endpoint"):
        convert_params(raw)
    raw["sft"]["variants"] = []
    raw["evaluate"]["policies"] = ["base"]
    convert_params(raw)
    convert_params(changed("model.teacher", "endpoint"))


def test_null_is_a_value_only_where_it_means_something() -> None:
    for key in (
        "model.teacher",
        "model.script",
        "strip.max_invalid",
        "strip.min_score",
        "endpoint.api_key_env",
        "endpoint.budget",
    ):
        convert_params(changed(key, None))


@pytest.mark.parametrize("section", Params.__struct_fields__)
def test_a_missing_key_is_refused_by_name(section: str) -> None:
    raw = yaml.safe_load(FILE.read_text())
    del raw[section]
    with pytest.raises(ConfigError, match=f"missing required field `{section}`"):
        convert_params(raw)


def test_unreadable_files_are_designed_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="project's root"):
        load_params(tmp_path / "params.yaml")
    for text in (b"a: [1", b"", b"- 1\n", b"\tseed: 1", b"a: 1\na: 2", b"a: \xff", b"a: 2020-99-99", b"[" * 2000):
        (tmp_path / "params.yaml").write_bytes(text)
        with pytest.raises(ConfigError, match=r"params\.yaml") as caught:
            load_params(tmp_path / "params.yaml")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["5e-5", "0.00005", "1e-4", "2.0e-4", "1", "3e0"])
def test_a_number_that_dvc_or_a_profile_writes_is_a_number(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").write_text(FILE.read_text())
    monkeypatch.chdir(tmp_path)
    override(Path("params.yaml"), [f"sft.lora.lr={value}"])
    assert load_params().sft.lora.lr == float(value)
    for name, text in (("default", "sft: {lora: {lr: 5.0e-4}}"), ("mine", f"sft: {{lora: {{lr: {value}}}}}")):
        write_atomic(Path(f"profiles/{name}.yaml"), text.encode())
    for name, rate in (("default", 5e-4), ("mine", float(value)), ("default", 5e-4)):
        assert profiles.apply(name)[0] == load_params()
        assert load_params().sft.lora.lr == rate


def test_parameters_cannot_be_changed_by_a_stage() -> None:
    params = load_params(FILE)
    with pytest.raises(AttributeError):
        params.hints.k = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert all(s.__struct_config__.frozen for s in Section.__subclasses__())


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("sft.variants", ["sft", "sft_retry"], "teach.variants lacks"),
        ("sft.seeds", [], "sft.seeds is empty"),
        ("sft.seeds", [0, 1, 0], "sft.seeds names 0 more than once"),
        ("sft.variants", ["sft", "sft"], "sft.variants names sft more than once"),
        ("evaluate.policies", ["base", "rag", "base"], "evaluate.policies names base more than once"),
        ("teach.variants", ["hints", "hints"], "teach.variants names hints more than once"),
        ("coldstart.plain", 0.9, "exceed 1"),
        ("model.engine", "scripted", "set model.script"),
        ("training", {**TRAINING, "launch": "one", "processes": 2}, "launch is one, but training.processes is 2"),
        ("endpoint.base_url", "localhost:8000/v1", "no http"),
        ("endpoint.base_url", "https://me:secret@host/v1", "holds a user or a query"),
        ("endpoint.base_url", "https://host/v1?key=secret", "holds a user or a query"),
        ("endpoint.base_url", "https://[host/v1", "no http"),
        ("vllm.url", "http://me:secret@h:1/v1", "vllm.url holds a user or a query.*VLLM_API_KEY"),
        ("vllm.url", "http://h:1/v1\n", "vllm.url is no http"),
        ("vllm.url", "h:1/v1", "vllm.url is no http"),
        ("vllm.args", ["--dtype", "auto", "--api-key", "secret"], "vllm.args holds a secret"),
        ("vllm.args", ["--api_key=secret"], "vllm.args holds a secret"),
        ("track.uri", "http://[", "track.uri is no http"),
        ("track.uri", "http://host\n", "track.uri is no http"),
        ("track.uri", "http://host:port", "track.uri is no http"),
        ("ray.address", "host:1\n", r"ray\.address"),
        ("endpoint.api_key_env", "sk-secret", r"endpoint\.api_key_env"),
        ("endpoint.api_key_env", "gsk_secret0123456789", r"endpoint\.api_key_env"),
    ],
)
def test_values_that_are_wrong_together_fail_before_anything_runs(key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        convert_params(changed(key, value))
    assert "secret" not in str(caught.value).replace("a secret", "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "raw"),
        ({"evaluate.policies": ["base"]}, None),
        ({"coldstart.enabled": False}, None),
        ({"evaluate.policies": ["base"], "model.teacher": "owner/larger"}, "model.teacher owner/larger"),
        ({"evaluate.policies": ["base"], "model.teacher": "endpoint"}, None),
        ({"coldstart.enabled": False, "hints.llm.model": "owner/other"}, None),
        ({"coldstart.enabled": False, "hints.llm.model": "owner/other", "hints.extractor": "llm"}, "owner/other"),
        ({"coldstart.enabled": False, "hints.ranker_model": "owner/other", "hints.ranker": "llm"}, "owner/other"),
        ({"coldstart.enabled": False, "hints.ranker_model": "endpoint", "hints.ranker": "llm"}, None),
    ],
)
@pytest.mark.parametrize(
    ("engine", "why"),
    [("vllm", "vllm.url serves one base"), ("endpoint", "model.engine is endpoint.*answered by endpoint.model")],
)
def test_a_server_of_one_model_is_never_asked_for_others(
    change: dict[str, object], says: str | None, engine: str, why: str
) -> None:
    raw = changed("model.engine", engine)
    for key, value in {"vllm.url": "http://h:1/v1", "sft.variants": [], **change}.items():
        *sections, last = key.split(".")
        reduce(lambda section, name: section[name], sections, raw)[last] = value
    if says is None:
        convert_params(raw)
    else:
        with pytest.raises(ConfigError, match=why) as caught:
            convert_params(raw)
        assert says in str(caught.value)
