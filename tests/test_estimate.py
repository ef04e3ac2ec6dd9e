"""The estimate is arithmetic over the parameters: it scales as they do, names its sources and spends nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from ragdistill import profiles
from ragdistill.commands import estimate as command
from ragdistill.commands.costs import REPAIRED, Row, Speeds, episode, size, stages
from ragdistill.commands.estimate import estimate, here, measured
from ragdistill.errors import ConfigError
from ragdistill.llm.ledger import Ledger
from ragdistill.params import Params, convert_params
from ragdistill.records import Usage, write_json
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
    raw |= {key: change.pop(key) for key in list(change) if "__" not in key}
    for key, value in change.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    return convert_params(raw)


def params_raw(p: Params) -> dict[str, Any]:
    return msgspec.to_builtins(p)


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


def test_the_paper_s_own_cell_says_how_often_it_wins() -> None:
    small = params(model__base="Qwen/Qwen2.5-7B-Instruct", agent__name="react")
    assert [round(episode(small, None, policy).success, 6) for policy in ("base", "rag")] == [0.112, 0.731]
    shop = params(model__base="Qwen/Qwen2.5-7B-Instruct", env__name="webshop", agent__name="act")
    assert (episode(shop, None, "base").success, episode(shop, None, "base").steps) == (0.19, 7.2)
    assert round(episode(params(), None, "base").success, 6) == 0.776, "no such model"


def test_hints_by_a_model_are_priced_where_it_runs_and_counted_as_they_are_read() -> None:
    few = {"hints__extractor": "llm", "tasks__train": 100, "rollouts__attempts": 2, "model__base": "x-14b"}
    local = rows(params(**few), FOUND)["hints"]
    assert (local.where, local.most > 0, local.calls) == ("GPU", True, pytest.approx(100 * (1 + REPAIRED)))
    own = {**params_raw(params(**few))["hints"]["llm"], "cases": 5, "mode": "single", "context_tokens": 2000}
    capped = rows(params(**few, hints__llm={**own, "model": "endpoint"}), FOUND)["hints"]
    assert (capped.where, capped.gpu_hours, capped.calls) == ("endpoint", 0, pytest.approx(6 * 5 * (1 + REPAIRED)))
    assert capped.prompt == pytest.approx(capped.calls * (2000 - 2 * own["max_reply_tokens"]))
    assert capped.completion == pytest.approx(capped.calls * 150)
    assert rows(params(**few, model__teacher="endpoint"), FOUND)["hints"].where == "endpoint", "the teacher writes them"
    small = rows(params(**few, hints__llm={**own, "model": "x-7b"}), FOUND)["hints"]
    large = rows(params(**few, hints__llm={**own, "model": "x-14b"}), FOUND)["hints"]
    assert small.hours == pytest.approx(large.hours / 2)


def test_a_ranker_that_asks_and_measured_lift_are_counted() -> None:
    assert not {"lift", "teach@hints, ranker"} & set(rows(params()))
    found = rows(params(hints__ranker="llm", tasks__train=100, tasks__test=30, model__base="x-14b"), FOUND)
    asked = [name for name in found if name.endswith(", ranker")]
    assert asked == ["teach@hints, ranker", "evaluate@rag-0, ranker"]
    assert (found[asked[0]].calls, found[asked[1]].calls) == (100, 30)
    assert not [n for n in rows(params(hints__ranker="llm", hints__per_bucket=3)) if "ranker" in n], "nothing to choose"
    own = params_raw(params())["hints"]["llm"] | {"model": "endpoint"}
    for model, where in ((None, "GPU"), ("endpoint", "endpoint")):
        priced = rows(params(hints__ranker="llm", hints__ranker_model=model, hints__llm=own), FOUND)
        assert priced[asked[0]].where == where, "who writes hints does not choose them"
    measured_lift = rows(params(lift={"hints": 4, "tasks": 10, "attempts": 2}, tasks__train=600), FOUND)["lift"]
    assert measured_lift.calls == pytest.approx(6 * 10 * 2 * (4 + 1) * 10)
    few = rows(params(lift={"hints": 4, "tasks": 10, "attempts": 2}, tasks__train=30), FOUND)["lift"]
    assert few.calls == pytest.approx(30 * 2 * (4 + 1) * 10), "no more tasks than there are"


def test_a_profile_is_estimated_as_it_would_change_the_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert estimate("paper-alfworld-14b-react", Path("params.yaml"), SPEEDS) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    for stage in ("rollouts", "hints", "teach@hints", "sft@distilled-0", "evaluate@distilled-0", "all"):
        assert stage in lines, out
    assert "endpoint" in lines["hints"] and "GPU" in lines["rollouts"] and "coldstart" not in lines
    assert "success of alfworld/14B/react" in out and "one call a failure" in out


@pytest.mark.parametrize("name", [n for n in profiles.names(ROOT / "profiles") if n.startswith("paper-")])
def test_the_budget_of_a_paper_profile_covers_what_it_is_estimated_to_cost(name: str) -> None:
    p = profiles.overlaid(name, ROOT / "params.yaml", ROOT / "profiles")
    cost = sum(r.most for r in rows(p).values() if r.where == "endpoint")
    assert p.endpoint.budget is not None and 0 < cost < p.endpoint.budget


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
    ("split", "test", "played"),
    [("official_test", 100, 100), ("official_test", 900, 500), ("official_eval", 5000, 1000), ("test", 60, 60)],
)
def test_of_webshops_official_goals_those_are_counted_that_are_played(split: str, test: int, played: int) -> None:
    p = params(env__name="webshop", tasks__eval_split=split, tasks__test=test, hints__ranker="llm")
    assert rows(p)["evaluate@rag-0, ranker"].calls == played


@pytest.mark.parametrize(("env", "types"), [("alfworld", 6), ("webshop", 5)])
def test_failures_are_read_for_each_kind_of_task_that_has_hints_of_its_own(env: str, types: int) -> None:
    p = params(env__name=env, tasks__train=100_000, hints__extractor="llm")
    assert rows(p)["hints"].calls == pytest.approx(types * p.hints.llm.cases * (1 + REPAIRED))


@pytest.mark.parametrize("split", ["valid_seen", "valid_unseen"])
def test_alfworlds_official_games_are_counted_whole(split: str) -> None:
    p = params(tasks__source="official", tasks__eval_split=split, tasks__test=10, hints__ranker="llm")
    assert rows(p)["evaluate@rag-0, ranker"].calls == {"valid_seen": 140, "valid_unseen": 134}[split]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen/Qwen2.5-14B-Instruct", 14), ("Qwen2.5-7B", 7), ("smollm2-135m-instruct", 0.135), ("llama-1.5b", 1.5),
     ("no-number", 14)],
)  # fmt: skip
def test_the_size_is_read_from_the_model_s_name(name: str, billions: float) -> None:
    assert size(name) == pytest.approx(billions)


def write_run(ran: Params, reported: str = "1") -> None:
    """What a run leaves in the working directory: its metrics, and dvc.lock, which says what they are of."""
    raw, path = params_raw(ran), "data/rollouts.jsonl"
    report = {"deps": [{"path": path, "md5": reported}]}
    read = {name: raw[name] for name in ("env", "agent", "model")} | {"endpoint.model": raw["endpoint"]["model"]}
    rollouts = {"params": {"params.yaml": read}, "outs": [{"path": path, "md5": "1"}]}
    write_json(Path("dvc.lock"), {"stages": {"rollouts": rollouts, "report": report}})
    write_json(Path("results/metrics.json"), FOUND)
    write_json(Path("results/timing.json"), {"rollouts": Timing(seconds=360.0, work=192, cold=360.0)})


def test_measurements_of_another_model_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert measured(params()) is None
    write_run(params())
    assert measured(params()) == measured(params(env__max_steps=50)) == FOUND
    for change in (
        {"model__base": "other"}, {"model__teacher": "endpoint"}, {"agent__name": "stateact"}, {"agent__examples": 2},
        {"env__max_steps": 9}, {"env__name": "webshop"},
    ):  # fmt: skip
        assert measured(params(**change)) is None, change
    write_run(params(), reported="2")
    assert measured(params()) is None, "the rollouts are newer than the report"
    (tmp_path / "dvc.lock").write_text("stages: [cut")
    assert measured(params()) is None


def test_a_profile_is_estimated_alike_before_and_after_it_is_written_into_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, project = "paper-alfworld-14b-react", tmp_path / "params.yaml"
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    shutil.copy(ROOT / "params.yaml", project)
    monkeypatch.chdir(tmp_path)
    write_run(params())
    assert estimate(None, project, SPEEDS) == 0
    own = capsys.readouterr().out
    told = [line.partition(": ")[0] for line in own.splitlines() if "(measured, results" in line]
    assert told == ["- an episode"] and own.count(" here ") == 1, "no rag row was measured, nor another stage's time"
    estimate(name, project, SPEEDS)
    before = capsys.readouterr().out.splitlines()
    profiles.apply(name, project)
    estimate(None, project, SPEEDS)
    assert capsys.readouterr().out.splitlines()[1:] == before[1:]


def test_what_is_spent_already_counts_against_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    name = "paper-alfworld-14b-react"
    e = profiles.overlaid(name).endpoint
    estimate(name, Path("params.yaml"), SPEEDS)
    assert "may stop this" not in capsys.readouterr().out
    ledger = Ledger(tmp_path / "ledger.jsonl", "hints", e.model, e.prices, None, e.currency)
    ticket = ledger.reserve(0, 10**6)
    assert ticket and e.budget
    tokens = int((e.budget - 0.5) / e.prices.completion * 1e6)
    ledger.settle(ticket, Usage(prompt_tokens=0, completion_tokens=tokens, computed_tokens=tokens))
    estimate(name, Path("params.yaml"), SPEEDS)
    assert f"and {e.budget - 0.5:.2f} are spent already" in capsys.readouterr().out


def test_another_file_is_estimated_with_every_assumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = changed("model.base", "Qwen/Qwen2.5-14B-Instruct")
    raw["model"]["teacher"] = "endpoint"
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(raw))
    assert estimate(None, tmp_path / "big.yaml", SPEEDS) == 0
    out = capsys.readouterr().out
    for part in ("rollouts", "GPU-hours", "the paper's 14B ReAct agent", "gpt-4o", "10,000 prefill", "endpoint.budget"):
        assert part in out
    assert command.METRICS.parent.name == "results" and not (tmp_path / "results").exists()
    with pytest.raises(ConfigError, match="must be positive"):
        estimate(None, tmp_path / "big.yaml", Speeds(0, 1, 1, 1, 0))


def test_only_times_of_cold_runs_stand_for_the_work_and_in_proportion_to_it() -> None:
    """A replay of 480 episodes takes seconds; an estimate from it would promise that playing them does."""
    rows = [
        Row("rollouts", "GPU", hours=9.0, gpu_hours=9.0, most=3.0, work=960),
        Row("teach@hints", "GPU", hours=9.0, work=240),
        Row("hints", "GPU", hours=9.0),
    ]
    timing = {
        "rollouts": Timing(seconds=8.0, replayed=1.0, work=480, cold=1800.0),
        "teach@hints": Timing(seconds=7.0, replayed=1.0, work=240),
        "hints": Timing(seconds=0.1, cold=0.1),
    }
    first, *others = here(rows, timing)
    assert (first.where, first.hours, first.gpu_hours, first.most) == ("here", 1.0, 0.0, 0.0)
    assert others == rows[1:]


def test_students_learn_from_what_was_won_by_those_they_learn_from() -> None:
    plays = dict.fromkeys(("steps", "tokens_billed", "tokens_completion", "tokens_computed"), 10)
    found = {"policies": {"base": plays | {"success": 0.25}, "rag": plays | {"success": 0.75}}}

    def steps(**change: Any) -> dict[str, float]:
        p = params(
            tasks__train=160, rollouts__attempts=2, teach__variants=["hints", "retry"],
            sft__variants=["sft", "distilled", "sft_retry"], **change,
        )  # fmt: skip
        every = rows(p, found)
        return {name: every[f"sft@{name}-0"].work / p.sft.lora.epochs * p.sft.lora.batch for name in p.sft.variants}

    assert steps() == {"sft": 40, "distilled": 120, "sft_retry": 40}
    strip = params_raw(params())["strip"] | {"per_task": 9}
    assert steps(strip=strip) == {"sft": 80, "distilled": 360, "sft_retry": 120}
    assert steps(strip=strip, sft__include_base_successes=False)["distilled"] == 120
    p = params(tasks__train=160, rollouts__attempts=2, teach__tasks="failures", model__base="x-14b")
    assert rows(p, found)["teach@hints"].calls == 160 * (1 - 0.25**2) * 10, "those that some attempt failed"
    assert steps(teach__tasks="failures", sft__include_base_successes=False)["distilled"] == 120, "of 112.5"
