"""The estimate is arithmetic over the parameters: it scales as they do, names its sources and spends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ragdistill.commands import estimate as command
from ragdistill.commands.estimate import (
    Row,
    Speeds,
    episode,
    estimate,
    here,
    measured,
    read_profile,
    size,
    stages,
)  # fmt: skip
from ragdistill.errors import ConfigError
from ragdistill.params import Params, convert_params
from ragdistill.records import write_json
from ragdistill.timing import Timing
from tests.test_params import changed

ROOT = Path(__file__).resolve().parents[1]
SPEEDS = Speeds(prefill=10_000, decode=1_000, train=1_000, latency=2.0, gpu_price=3.0)
FOUND = {
    "env": "alfworld",
    "agent": "react",
    "policies": {
        "base": {
            "steps": 10,
            "tokens_billed": 5_000,
            "tokens_completion": 200,
            "tokens_computed": 1_200,
            "success": 0.5,
        }
    },
}


def params(**change: Any) -> Params:
    raw = changed("label", "x")
    for key, value in change.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    return convert_params(raw)


def rows(p: Params, metrics: Any = None) -> dict[str, Row]:
    return {r.stage: r for r in stages(p, metrics, SPEEDS)}


def test_measured_episodes_are_multiplied_by_their_number() -> None:
    p = params(tasks__train=100, rollouts__attempts=2, model__base="x-14b", coldstart__enabled=False)
    r = rows(p, FOUND)["rollouts"]
    assert (r.calls, r.prompt, r.computed, r.completion) == (2_000, 200 * 4_800, 200 * 1_000, 200 * 200)
    assert r.gpu_hours == pytest.approx((200_000 / 10_000 + 40_000 / 1_000) / 3600)
    assert r.most == r.least == pytest.approx(3.0 * r.gpu_hours)


def test_a_served_teacher_costs_money_between_all_cached_and_none() -> None:
    p = params(
        model__teacher="endpoint", endpoint__prices={"prompt": 2.0, "cached": 1.0, "completion": 8.0},
        tasks__train=100, rollouts__attempts=2, endpoint__max_concurrency=10,
    )  # fmt: skip
    found = rows(p, FOUND)
    r = found["rollouts"]
    assert (r.where, r.gpu_hours) == ("endpoint", 0)
    assert r.most == pytest.approx((960_000 * 2 + 40_000 * 8) / 1e6)
    assert r.least == pytest.approx((200_000 * 2 + 760_000 * 1 + 40_000 * 8) / 1e6)
    assert r.hours == pytest.approx(2_000 * 2 / 10 / 3600)
    assert found["teach@hints"].where == "endpoint" and found["evaluate@base-0"].where == "GPU"


def test_priors_stay_within_the_parameters_and_are_the_paper_s() -> None:
    play = episode(params(), None, "base")
    assert play.prompt + play.completion == pytest.approx(50_100)
    assert episode(params(env__max_steps=5), None, "base").steps == 5
    tight = params(agent__context_tokens=1_000)
    assert episode(tight, None, "base").prompt <= 1_000 * play.steps
    assert episode(params(), None, "rag").prompt > play.prompt


def test_every_stage_of_the_default_that_costs_something_is_there() -> None:
    names = list(rows(params()))
    assert names == [
        "coldstart", "rollouts", "teach@hints", "sft@sft-0", "sft@distilled-0", "evaluate@raw-0", "evaluate@base-0",
        "evaluate@rag-0", "evaluate@sft-0", "evaluate@distilled-0",
    ]  # fmt: skip
    assert "coldstart" not in rows(params(coldstart__enabled=False))
    assert rows(params(tasks__source="official", tasks__eval_split="valid_unseen"))["evaluate@base-0"].calls == (
        pytest.approx(134 * 18.9)
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen/Qwen2.5-14B-Instruct", 14), ("Qwen2.5-7B", 7), ("smollm2-135m-instruct", 0.135), ("llama-1.5b", 1.5),
     ("no-number", 14)],
)  # fmt: skip
def test_the_size_is_read_from_the_model_s_name(name: str, billions: float) -> None:
    assert size(params(model__base=name)) == pytest.approx(billions)


def test_measurements_of_another_model_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert measured(params()) is None
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    write_json(tmp_path / "results/metrics.json", FOUND)
    assert measured(params()) == FOUND
    assert measured(params(model__base="other")) is None
    assert measured(params(model__teacher="endpoint")) is None
    assert measured(params(agent__name="stateact")) is None
    assert measured(params(agent__examples=2)) is None


def test_another_file_is_estimated_with_every_assumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = changed("model.base", "Qwen/Qwen2.5-14B-Instruct")
    raw["model"]["teacher"] = "endpoint"
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(raw))
    assert estimate(tmp_path / "big.yaml", SPEEDS) == 0
    out = capsys.readouterr().out
    for part in ("rollouts", "GPU-hours", "the paper's 14B ReAct agent", "gpt-4o", "10,000 prefill", "endpoint.budget"):
        assert part in out
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "part.yaml").write_text("model: {base: Qwen2.5-7B}\nsft: {lora: {epochs: 7}}\n")
    part = read_profile(tmp_path / "part.yaml", tmp_path / "params.yaml")
    assert (part.model.base, part.sft.lora.epochs, part.sft.lora.r) == ("Qwen2.5-7B", 7, params().sft.lora.r)
    assert command.METRICS.parent.name == "results" and not (tmp_path / "results").exists()
    with pytest.raises(ConfigError, match="must be positive"):
        estimate(tmp_path / "big.yaml", Speeds(0, 1, 1, 1, 0))


def test_only_times_of_cold_runs_stand_for_the_work() -> None:
    """A replay of 480 episodes takes seconds; an estimate from it would promise that playing them does."""
    rows = [Row("rollouts", "GPU", hours=9.0, gpu_hours=9.0, most=3.0), Row("teach@hints", "GPU", hours=9.0)]
    timing = {
        "rollouts": Timing(seconds=8.0, replayed=1.0, work=480, cold=1800.0),
        "teach@hints": Timing(seconds=7.0, replayed=1.0, work=240),
    }
    first, second = here(rows, timing)
    assert (first.where, first.hours, first.gpu_hours, first.most) == ("here", 0.5, 0.0, 0.0)
    assert second == rows[1]
