"""The paper's numbers: transcribed right, shown beside ours only where both are of the same thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill import profiles, stats
from ragdistill.params import EnvParams, ReportParams, load_params
from ragdistill.records import EvalEpisode, StopReason
from ragdistill.report.metrics import compute_metrics
from ragdistill.report.page import Page, render
from ragdistill.report.paper import compare, newcombe, published
from ragdistill.stages.defaults import settle
from ragdistill.stages.report import player

QWEN = "Qwen/Qwen2.5-7B-Instruct"
ROOT = Path(__file__).resolve().parents[1]
ALFWORLD = settle(load_params(ROOT / "params.yaml")).env


def cell_of(name: str) -> Any:
    """A profile's parameters."""
    return settle(profiles.overlaid(name, ROOT / "params.yaml", ROOT / "profiles"))


WEBSHOP: EnvParams = cell_of("paper-webshop-7b-react").env


def metrics(env: str = "alfworld", split: str = "valid_unseen", n: int = 134, agent: str = "react") -> dict[str, Any]:
    """Base wins 10 % and distilled 80 % of `n` tasks."""
    episodes = [
        EvalEpisode(
            policy=policy, seed=0, task_id=f"t{i}", kind="k", bucket="k", group=f"g{i % 4}", success=i < share * n,
            score=float(i < share * n), steps=5, invalid=0, tokens_billed=9, tokens_computed=9, tokens_completion=1,
            seconds=1.0, stop=StopReason.SUCCESS if i < share * n else StopReason.MAX_STEPS,
        )
        for policy, share in (("base", 0.1), ("distilled", 0.8))
        for i in range(n)
    ]  # fmt: skip
    params = ReportParams(bootstrap=50, confidence=0.95)
    return compute_metrics(episodes, env=env, agent=agent, split=split, label="x", primary=[], params=params)


def test_every_published_success_is_a_share_of_the_papers_number_of_tasks() -> None:
    """A slip of the pen would hardly be a whole number of 134 games."""
    paper = published()
    assert len(paper.results) == 8
    for cell, rows in paper.results.items():
        tasks = paper.protocols[cell.split("/")[0]].tasks
        assert list(rows) == ["base", "rag", "sft", "distilled"]
        for success, *score in rows.values():
            assert abs(100 * round(success / 100 * tasks) / tasks - success) < 0.051
            assert len(score) == (cell.startswith("webshop"))


def test_the_headline_is_the_mean_of_the_two_14b_agents() -> None:
    results = published().results
    both = [results[f"alfworld/14B/{agent}"] for agent in ("react", "stateact")]
    assert sum(r["distilled"][0] for r in both) / 2 == pytest.approx(91, abs=0.5)
    assert sum(r["base"][0] for r in both) / 2 == pytest.approx(79, abs=1.0)


@pytest.mark.parametrize("name", [n for n in profiles.names(ROOT / "profiles") if n.startswith("paper-")])
def test_each_profile_of_the_paper_plays_the_protocol_it_is_set_beside(name: str) -> None:
    p = cell_of(name)
    protocol = published().protocols[p.env.name]
    assert p.env.name == "alfworld" or p.tasks.test == protocol.tasks
    found = compare(metrics(p.env.name, p.tasks.eval_split, protocol.tasks, p.agent.name), p.env, p.model.base)
    assert found is not None and found.cell == "/".join((p.env.name, *name.upper().split("-")[2:3], name.split("-")[3]))


@pytest.mark.parametrize(
    "changed",
    [{"max_steps": 50}, *({"webshop": {k: v}} for k, v in (
        ("goals", "synthetic"), ("infeasible", "exclude"), ("observation", "chosen"), ("attributes_page", True),
        ("products", 1000),
    ))],
    ids=str,
)  # fmt: skip
def test_nothing_is_set_beside_another_game(changed: dict[str, Any]) -> None:
    change, shop = msgspec.structs.replace, changed.pop("webshop", {})
    env = change(WEBSHOP, webshop=change(WEBSHOP.webshop, **shop), **changed)
    played = metrics("webshop", "official_test", 100, "act")
    assert compare(played, WEBSHOP, QWEN) is not None
    assert compare(played, env, QWEN) is None
    assert compare(metrics(), change(ALFWORLD, max_steps=30), QWEN) is None


@pytest.mark.parametrize(("env", "agent"), [("webshop", "react"), ("alfworld", "act")])
def test_the_papers_react_thinks_on_alfworld_and_does_not_on_webshop(env: str, agent: str) -> None:
    split, tasks, shop = ("official_test", 100, WEBSHOP) if env == "webshop" else ("valid_unseen", 134, ALFWORLD)
    assert compare(metrics(env, split, tasks, agent), shop, QWEN) is None


@pytest.mark.parametrize(
    ("changed", "model"),
    [
        ({"env": "repair_shop"}, QWEN),
        ({"split": "valid_seen"}, QWEN),
        ({"n": 100}, QWEN),
        ({"agent": "other"}, QWEN),
        ({}, "smollm2-135m-instruct"),
    ],
    ids=["environment", "split", "number of tasks", "agent", "model"],
)
def test_nothing_is_set_beside_another_protocol(changed: dict[str, Any], model: str) -> None:
    m = metrics(**changed)
    found = compare(m, ALFWORLD, model)
    assert found is None
    assert 'id="paper"' not in render(Page(m, paper=found))


def test_the_same_cell_stands_beside_ours_with_intervals() -> None:
    m = metrics()
    found = compare(m, ALFWORLD, f"{QWEN}@main")
    assert found is not None and found.cell == "alfworld/7B/react"
    base, distilled = found.rows
    assert (base.policy, distilled.policy) == ("base", "distilled")
    assert distilled.theirs == stats.wilson(92, 134)
    assert distilled.difference.value == pytest.approx(108 / 134 - 92 / 134, abs=1e-4)
    assert distilled.difference.lo < distilled.difference.value < distilled.difference.hi
    html = render(Page(m, paper=found))
    assert 'id="paper"' in html and "68.7 %" in html and "arXiv 2510.01375" in html
    assert "score,<br>the paper" not in html


@pytest.mark.parametrize(("served", "cell"), [("gpt-4o", None), (QWEN, "alfworld/7B/react")])
def test_a_served_models_games_are_set_beside_its_own_cell_only(served: str, cell: str | None) -> None:
    shipped = load_params(ROOT / "params.yaml")
    model, endpoint = (
        msgspec.structs.replace(section, **change)
        for section, change in ((shipped.model, {"base": QWEN}), (shipped.endpoint, {"model": served}))
    )
    params = msgspec.structs.replace(shipped, model=model, endpoint=endpoint)
    assert player(params) == {"base model": QWEN}, "where the endpoint does not play"
    playing = msgspec.structs.replace(model, engine="endpoint")
    said = player(msgspec.structs.replace(params, model=playing))
    assert said == {"served model": served}
    found = compare(metrics(), ALFWORLD, *said.values())
    assert (found and found.cell) == cell


def test_webshops_act_is_the_papers_react_and_has_a_score() -> None:
    m = metrics("webshop", "official_test", 100, "act")
    found = compare(m, WEBSHOP, QWEN)
    assert found is not None and found.cell == "webshop/7B/react"
    assert (found.rows[1].score, found.rows[1].their_score) == (80.0, 57.1)
    assert "score,<br>the paper" in render(Page(m, paper=found))


def test_newcombes_interval_is_the_published_example() -> None:
    """Newcombe 1998, table II: 56/70 against 48/80 has 0.2 with 0.0524 to 0.3339."""
    found = newcombe(stats.wilson(56, 70), stats.wilson(48, 80))
    assert (found.value, found.lo, found.hi) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
