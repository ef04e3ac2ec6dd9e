"""The report: numbers that follow from the episodes, tables, and a page that no text can break."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill.errors import DataError, EmptyResultError
from ragdistill.llm.ledger import Spent
from ragdistill.params import ReportParams
from ragdistill.records import EvalEpisode, Hint, Step, StopReason, Trajectory, Usage, write_json
from ragdistill.report import page, words
from ragdistill.report.browser import pick_games
from ragdistill.report.charts import Point, interval_chart, line_chart
from ragdistill.report.csvs import LossPoint, read_loss, write_csvs
from ragdistill.report.metrics import compare, compute_metrics, order, order_pairs
from ragdistill.report.page import Page, render, write_page
from ragdistill.report.table import comparison_table, policy_table
from ragdistill.timing import Timing

FAST = ReportParams(bootstrap=300, confidence=0.95)
KINDS = ("pick", "clean", "heat", "cool")
PRIMARY = ("clean", "heat", "cool")
RATES = {"base": 0.3, "rag": 0.7, "rag_random": 0.3, "sft": 0.4, "distilled": 0.7}
EVIL = "<script>alert('x')</script>{{ 7 * 7 }}"


def episode(policy: str, task: int, success: bool, seed: int = 0, **changes: Any) -> EvalEpisode:
    fields: dict[str, Any] = {
        "policy": policy, "seed": seed, "task_id": f"t{task}", "kind": KINDS[task % 4], "bucket": KINDS[task % 4],
        "group": f"room{task % 5}", "success": success, "score": float(success), "steps": 10, "invalid": 1,
        "tokens_billed": 500 if policy == "rag" else 400, "tokens_computed": 100, "tokens_completion": 50,
        "seconds": 1.5, "stop": StopReason.SUCCESS if success else StopReason.MAX_STEPS,
    }  # fmt: skip
    return EvalEpisode(**{**fields, **changes})


def study(tasks: int = 60, seeds: tuple[int, ...] = (0,)) -> list[EvalEpisode]:
    rng = random.Random(0)
    return [
        episode(policy, task, rng.random() < rate, seed)
        for policy, rate in RATES.items()
        for seed in (seeds if policy in ("sft", "distilled") else (0,))
        for task in range(tasks)
    ]


def measure(episodes: list[EvalEpisode], **changes: Any) -> dict[str, Any]:
    named: dict[str, Any] = {"env": "alfworld", "agent": "react", "split": "test", "label": "evidence"}
    return compute_metrics(episodes, **{**named, "primary": PRIMARY, "params": FAST, **changes})


def test_numbers_follow_from_the_episodes() -> None:
    """Eight tasks by hand: base wins t0, distilled wins t0-t5; only kinds clean, heat and cool are primary."""
    m = measure([episode(p, t, t < wins) for p, wins in (("base", 1), ("distilled", 6)) for t in range(8)])
    assert m["policies"]["base"]["success"] == 0.125
    assert m["policies"]["distilled"]["success"] == 0.75
    assert (m["policies"]["distilled"]["success_lo"], m["policies"]["distilled"]["success_hi"]) == (0.4093, 0.9285)
    pair = m["paired"]["distilled-base"]
    assert (pair["diff"], pair["wins"], pair["losses"], pair["n"], pair["p"]) == (0.625, 5, 0, 8, 0.0625)
    first = m["primary"]
    assert first["tasks"] == 6
    assert first["policies"]["distilled"]["success"] == round(4 / 6, 4)
    assert first["paired"]["distilled-base"]["wins"] == 4
    assert m["by_kind"]["pick"]["distilled"] == {"n": 2, "success": 1.0, "lo": 0.3424, "hi": 1.0}
    assert {room: (c["base"]["n"], c["distilled"]["success"]) for room, c in m["by_room"].items()} == {
        "room0": (2, 1.0), "room1": (2, 0.5), "room2": (2, 0.5), "room3": (1, 1.0), "room4": (1, 1.0),
    }  # fmt: skip


def test_shape_is_what_dvc_and_the_promotion_read() -> None:
    m = measure(study(seeds=(0, 1)))
    assert list(m["policies"]) == ["base", "rag_random", "rag", "sft", "distilled"]
    assert {"distilled-base", "distilled-rag", "distilled-sft", "rag-base", "rag-rag_random"} <= set(m["paired"])
    assert m["seeds"] == [0, 1]
    assert m["policies"]["distilled"]["n"] == 60
    assert m["policies"]["distilled"]["episodes"] == 120
    assert set(m["policies"]["distilled"]["by_seed"]) == {"0", "1"}
    assert m["tokens"]["distilled_over_rag"]["billed"] == 0.8
    assert not re.search(r"\.\d{5}", json.dumps(m, allow_nan=False))
    for row in m["policies"].values():
        assert 0 <= row["success_lo"] <= row["success"] <= row["success_hi"] <= 1
    assert json.loads(json.dumps(m)) == m


def test_infrastructure_faults_are_never_failures() -> None:
    clean = [episode(p, t, t % 2 == 0) for p in ("base", "distilled") for t in range(8)]
    broken = [e for e in clean if not (e.policy == "base" and e.task_id == "t0")]
    broken.append(episode("base", 0, False, stop=StopReason.INFRA_ERROR, steps=0, tokens_billed=0))
    m = measure(broken)
    base = m["policies"]["base"]
    assert (base["n"], base["infra"], base["success"], base["steps"]) == (7, 1, round(3 / 7, 4), 10)
    pair = m["paired"]["distilled-base"]
    assert (pair["n"], pair["dropped"], pair["losses"]) == (7, 1, 0)


def test_policy_lost_to_infrastructure_leaves_the_rest_standing() -> None:
    lost = [episode("rag", t, False, stop=StopReason.INFRA_ERROR) for t in range(8)]
    m = measure([e for e in study(8) if e.policy != "rag"] + lost)
    assert m["policies"]["rag"] == {"n": 0, "episodes": 0, "infra": 8}
    assert "distilled-rag" not in m["paired"]
    assert "| rag " in policy_table(m)
    assert "8 episodes lost" in render(Page(m))


def test_promotion_compares_common_primary_tasks() -> None:
    ours = [episode("challenger", t, t < 6) for t in range(8)]
    theirs = [episode("champion", t, t < 2) for t in range(1, 8)]
    got = compare(ours, theirs, PRIMARY, FAST)
    assert (got.n, got.wins, got.losses) == (6, 3, 0)
    with pytest.raises(EmptyResultError, match="in common"):
        compare(ours, theirs[:0], PRIMARY, FAST)


def test_seeds_of_a_policy_do_not_count_as_more_tasks() -> None:
    one, three = measure(study(40, (0,))), measure(study(40, (0, 1, 2)))
    assert one["policies"]["distilled"]["n"] == three["policies"]["distilled"]["n"] == 40
    assert three["paired"]["distilled-base"]["n"] == 40


def test_a_task_played_twice_is_refused() -> None:
    with pytest.raises(DataError, match="base-0 played t1 twice"):
        measure([episode("base", 1, True), episode("base", 1, False)])


def test_no_primary_episode_is_an_error_that_names_the_parameter() -> None:
    with pytest.raises(EmptyResultError, match=r"evaluate\.primary"):
        measure([episode("base", 0, True)])


def test_same_input_gives_the_same_file_in_any_order() -> None:
    episodes = study(30, (0, 1))
    assert measure(episodes) == measure(episodes[::-1])


def test_reading_order_survives_sorted_json() -> None:
    assert order(["zeta", "distilled", "base", "rag"]) == ["base", "rag", "distilled", "zeta"]
    assert order_pairs(["rag-base", "distilled-rag", "distilled-base"])[:2] == ["distilled-base", "distilled-rag"]


@pytest.mark.parametrize(
    ("wins", "verb"),
    [(56, "distilling raised success from 50.0 % to 93.3 %"), (30, "do not show"), (4, "distilling lowered success")],
)
def test_answer_claims_only_what_the_interval_supports(wins: int, verb: str) -> None:
    m = measure([episode(p, t, t < w) for p, w in (("base", 30), ("distilled", wins)) for t in range(60)], primary=())
    (sentence,) = words.answer(m)
    assert verb in sentence
    assert "60 tasks" in sentence


def test_answer_says_how_many_tokens_are_saved() -> None:
    text = " ".join(words.answer(measure(study())))
    assert "20 % fewer tokens" in text
    assert "own successes" in text


def test_table_holds_policies_then_differences_in_aligned_markdown() -> None:
    text = policy_table(measure(study()))
    blocks = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n\n")]
    policies, pairs = filter(None, blocks)
    assert [line.split("|")[1].strip() for line in policies[2:]] == ["base", "rag_random", "rag", "sft", "distilled"]
    assert pairs[2].startswith("| distilled − base")
    for block in (policies, pairs):
        assert len({len(line) for line in block}) == 1


def test_steps_and_tokens_have_their_intervals_in_every_table() -> None:
    numbers = {f"t{i}": {"steps": 8 + i % 4, "tokens_billed": 900 + i * i} for i in range(60)}
    m = measure([msgspec.structs.replace(e, **numbers[e.task_id]) for e in study()])
    row = m["policies"]["distilled"]
    assert row["steps_lo"] < row["steps"] < row["steps_hi"] and row["tokens_billed"] >= 1000 > row["tokens_computed"]
    steps = f"{row['steps']:.1f} [{row['steps_lo']:.1f}–{row['steps_hi']:.1f}]"
    billed = f"{row['tokens_billed']:,.0f} [{row['tokens_billed_lo']:,.0f}–{row['tokens_billed_hi']:,.0f}]"
    for text in (policy_table(m), comparison_table([("here", m)])):
        line = next(line for line in text.splitlines() if re.search(r"\| +distilled +\|", line))
        assert f" {steps} |" in line and f" {billed} |" in line
    older = {k: v for k, v in row.items() if not k.startswith("tokens_billed_")}
    assert f" {row['tokens_billed']:,.0f} |" in policy_table(m | {"policies": {"distilled": older}})


def scored(partly: float = 0.5) -> list[EvalEpisode]:
    """A study in which a lost episode earns `partly`, with parts."""
    return [
        msgspec.structs.replace(e, score=1.0 if e.success else partly, parts={"type": 1.0, "price": float(e.success)})
        for e in study()
    ]


def test_a_score_is_shown_with_its_difference_wherever_it_is_not_success() -> None:
    m = measure(scored(), infeasible={"t0", "t4"})
    assert m["feasible"]["tasks"] == 58 and m["feasible"]["policies"]["base"]["n"] == 58
    base, best = (m["policies"][n] for n in ("base", "distilled"))
    assert base["score"] == pytest.approx(0.5 + base["success"] / 2, abs=1e-4)
    assert m["feasible"]["primary"]["tasks"] == m["primary"]["tasks"] == 45, (
        "t0 and t4 are of a type that is not primary"
    )
    assert m["parts"]["base"] == {"n": 60, "type": 1.0, "price": base["success"]}
    text, html = policy_table(m), render(Page(m))
    for shown in (
        f"{100 * best['score']:.1f} [{100 * best['score_lo']:.1f}–{100 * best['score_hi']:.1f}]",
        f"{100 * m['feasible']['policies']['base']['score']:.1f} [",
        f"{100 * m['primary']['paired']['distilled-base']['score']:+.1f} [",
        "score, feasible",
        "parts of the reward, %",
    ):
        assert shown in text
    first = m["primary"]["policies"]
    assert f"went from {100 * first['base']['score']:.1f} to {100 * first['distilled']['score']:.1f}" in html
    assert "score,<br>feasible" in html and "difference of score" in html and "What the reward is made of" in html
    assert f"{100 * first['base']['score']:.0f} → {100 * first['distilled']['score']:.0f}" in html


def test_where_the_score_is_success_it_is_not_said_twice() -> None:
    m = measure(study())
    assert "feasible" not in m and "parts" not in m
    assert "score" not in policy_table(m).lower()
    assert "score," not in render(Page(m)) and "Score" not in render(Page(m))
    assert "feasible" not in measure(study(), infeasible={"another task"})


SETS = ("primary", "all", "feasible primary", "feasible")


def test_infeasible_primary_tasks_are_counted_with_and_without_on_the_primary_estimate() -> None:
    lost = {"t1", "t2", "t5"}
    clean = [e for e in scored() if e.task_id not in lost]
    m, without = measure(scored(), infeasible=lost), measure(clean)
    assert (m["primary"]["tasks"], m["feasible"]["primary"]["tasks"], m["feasible"]["tasks"]) == (45, 42, 57)
    assert m["feasible"]["primary"]["policies"] == without["primary"]["policies"] != m["primary"]["policies"]
    row = m["feasible"]["primary"]["policies"]["distilled"]
    head, _, *rows = policy_table(m).split("\n\n")[1].splitlines()
    names = [cell.strip() for cell in head.split("|")]
    assert names[2:10] == [f"{field}, {tasks}" for field in ("success %", "score") for tasks in SETS]
    cells = [cell.strip() for cell in rows[-1].split("|")]
    assert cells[4] == f"{100 * row['success']:.1f} [{100 * row['success_lo']:.1f}–{100 * row['success_hi']:.1f}]"
    html = render(Page(m))
    assert "success,<br>feasible primary" in html and "score,<br>feasible primary" in html
    assert "the 57 of 60 tasks, 42 of 45 primary ones, that can earn the full reward" in html
    older = m | {"feasible": {k: v for k, v in m["feasible"].items() if k != "primary"}}
    assert "feasible primary" not in policy_table(older) and "success %, feasible" in policy_table(older)
    assert measure(scored(), infeasible={e.task_id for e in scored() if e.kind in PRIMARY})["feasible"]["primary"] == {
        "tasks": 0, "policies": {}, "paired": {}, "tokens": {}
    }  # fmt: skip


def test_what_an_environment_says_of_its_tasks_stands_in_table_and_page() -> None:
    m, note = measure(study()), f"3 of 9 goals are left out {EVIL}."
    assert note in policy_table(m | {"task_note": note})
    assert note in parse(render(Page(m | {"task_note": note}))).text
    assert "left out, not counted as failures.</p>" in render(Page(m)) and "None" not in policy_table(m)


def test_csvs_have_the_score_s_interval_and_the_feasible_tasks(tmp_path: Path) -> None:
    m = measure(scored(), infeasible={"t1"})
    rows = list(csv.DictReader(write_csvs(tmp_path, m, {})[0].open()))
    assert [r["tasks"] for r in rows] == [name for name in SETS for _ in RATES]
    assert rows[-1]["success"] == str(m["feasible"]["policies"]["distilled"]["success"])
    assert [r["n"] for r in rows[:: len(RATES)]] == ["45", "60", "44", "59"]
    assert all(float(r["score_lo"]) <= float(r["score"]) <= float(r["score_hi"]) for r in rows)


def test_csvs_repeat_the_metrics(tmp_path: Path) -> None:
    m = measure(study())
    curve = [LossPoint(1, 0.5, 2.0, 1e-3, 300.0), LossPoint(2, 1.0, 1.5, 5e-4, 310.0)]
    policies, kinds, loss = write_csvs(tmp_path, m, {"distilled-0": curve})
    rows = policies.read_text().splitlines()
    assert len(rows) == 1 + 2 * len(RATES)
    assert rows[-1].startswith(f"distilled,all,60,{m['policies']['distilled']['success']}")
    assert len(kinds.read_text().splitlines()) == 1 + 4 * len(RATES)
    assert loss.read_text().splitlines()[1] == "distilled-0,1,0.5,2.0,0.001,300.0"
    assert read_loss(loss) == curve


def test_damaged_loss_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    path.write_text("step,epoch,loss,lr,tokens_per_second\n1,0.5,2.0,0.001,300\n2,0.5\n")
    with pytest.raises(DataError, match=r"loss\.csv:3"):
        read_loss(path)


def test_chart_places_values_on_round_ticks() -> None:
    chart = interval_chart("x", [("a", "a", "150", [Point(150, 100, 180, "t")])], lambda v: f"{v:g}")
    assert [t.label for t in chart.ticks] == ["0", "50", "100", "150", "200"]
    assert (chart.rows[0].marks[0].at, chart.rows[0].marks[0].hi) == (75, 90)
    signed = interval_chart("x", [("a", "a", "", [Point(-3, -8, 2, "t")])], lambda v: f"{v:g}", zero=True)
    assert signed.zero == 50


def test_losses_fall_over_decades_inside_the_chart() -> None:
    chart = line_chart({"a": [(1.0, 1.0), (2.0, 0.1), (4.0, 0.01)]})
    assert chart is not None
    ys = [float(p.split(",")[1]) for p in chart.lines[0].points.split()]
    assert ys == [0, 50, 100]
    assert [t.label for t in chart.y_ticks if not t.minor] == ["0.01", "0.1", "1"]
    narrow = line_chart({"a": [(1.0, 0.3), (2.0, 0.3)], "b": [(1.0, 0.0)]})
    assert narrow is not None
    assert all(0 <= float(p.split(",")[1]) <= 100 for line in narrow.lines for p in line.points.split())
    assert line_chart({}) is None
    assert line_chart({"a": [(1.0, 0.0)]}) is None


def trajectory(policy: str, task: int, won: bool, steps: tuple[Step, ...] = ()) -> Trajectory:
    walk = steps or (
        Step(reply="r", thought="I look for apple.", action="go to fridge 1", observation="It is closed."),
    )
    return Trajectory(
        id=f"{policy}{task}", task_id=f"t{task}", policy=policy, agent="react", attempt=0, seed=0, goal=f"goal {task}",
        bucket="clean", group="room", kind=KINDS[task % 4], steps=walk, usage=Usage(prompt_tokens=9),
        stop=StopReason.SUCCESS if won else StopReason.MAX_STEPS,
    )  # fmt: skip


def test_games_show_gains_of_different_kinds_and_a_loss() -> None:
    outcomes = [(False, True), (False, True), (False, True), (False, True), (False, True), (True, False), (True, True)]
    played = {p: [trajectory(p, t, o[i]) for t, o in enumerate(outcomes)] for i, p in enumerate(("base", "distilled"))}
    games = pick_games(played)
    assert [g.right.success for g in games] == [True, True, True, False]
    assert len({g.kind for g in games[:3]}) == 3


class Tags(HTMLParser):
    """Collects tags and addresses; checks that what is opened is closed."""

    VOID = ("meta", "link", "br", "input", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def full_page(m: dict[str, Any]) -> Page:
    bad = Step(reply=EVIL, thought=EVIL, action=EVIL, observation=EVIL, valid=False)
    hints = [
        Hint(id=f"h{i}", bucket=EVIL if i == 9 else "clean", text=EVIL, kind="contrast", mentions=i + 1, lift=0.5)
        for i in range(10)
    ]
    return Page(
        metrics=m,
        hints=hints,
        trajectories={p: [trajectory(p, 1, p == "distilled", (bad,))] for p in ("base", "distilled")},
        losses={EVIL: [LossPoint(1, 0.5, 2.0, 1e-3, 300.0), LossPoint(2, 1.0, 1.5, 5e-4, 310.0)]},
        trainings={"distilled-0": {"examples": 30, "loss": 0.0123456, "note": EVIL, "nested": {"a": 1}}},
        timings={
            "rollouts": Timing(seconds=7.0, replayed=1.0, work=480, cold=1200.0),
            "sft": Timing(seconds=300.5, replayed=0.0, cold=300.5),
            "teach": Timing(seconds=6.8, replayed=1.0, work=9),
        },
        engines={"base-0": "OpenVINO GenAI 2026.4.1, bfloat16, CPU", EVIL: "OpenVINO GenAI 2026.4.1, bfloat16, CPU"},
        at_once=32,
        spending=[Spent(stage=EVIL, model=EVIL, currency=EVIL, paid_calls=1, money=0.5)],
        provenance={"model": EVIL},
    )


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    return tags


def test_page_escapes_every_text_and_needs_nothing_else(tmp_path: Path) -> None:
    m = measure([*study(), episode(EVIL, 1, True)], split=EVIL)
    write_page(tmp_path / "report.html", full_page(m))
    html = (tmp_path / "report.html").read_text()
    assert len(re.findall(r"<script", html)) == 2, "the data and the page's own script"
    assert "<script>alert" not in html
    tags = parse(html)
    assert "{{ 7 * 7 }}" in tags.text
    assert tags.text.count("<script>alert('x')</script>") > 20
    assert [a for a in tags.addresses if not a.startswith(("data:", "#"))] == []
    assert "url(" not in html
    assert "@import" not in html


def test_only_the_page_s_own_script_may_run() -> None:
    html = render(full_page(measure(study())))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in html
    assert "default-src 'none'" in html
    own = (Path(page.__file__).parent / "page.js").read_text()
    assert script == own
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "fetch("):
        assert word not in own


def test_page_holds_the_answer_the_games_and_the_caveat() -> None:
    m = measure(study())
    text = " ".join(parse(render(full_page(m))).text.split())
    assert all(sentence in text for sentence in words.answer(m))
    assert "not evidence for capable models" in text
    assert "Lost before, won after distilling" in text
    assert "Smoke, not evidence" not in text
    assert "Smoke, not evidence" in render(Page(measure(study(), label="smoke")))


def test_page_reads_metrics_back_from_their_file(tmp_path: Path) -> None:
    m = measure(study())
    write_json(tmp_path / "metrics.json", m)
    assert render(Page(json.loads((tmp_path / "metrics.json").read_text()))) == render(Page(m))


def test_page_of_one_policy_has_no_empty_figures() -> None:
    text = parse(render(Page(measure([episode("base", t, False) for t in range(4)])))).text
    assert "no answer yet" in text
    assert "Differences" not in text
