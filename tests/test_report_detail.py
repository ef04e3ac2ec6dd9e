"""What the page computes beside the metrics: hint use, payback, and the games it stores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill.envs import Defaults, defaults_of, make_domain
from ragdistill.hints.lift import LiftRow
from ragdistill.llm.ledger import Spent
from ragdistill.params import load_params
from ragdistill.records import EvalEpisode, Hint, Step, StopReason, Trajectory, Usage
from ragdistill.report import figures, words
from ragdistill.report.browser import GameSet, browser_data, script_json, training_sources
from ragdistill.report.figures import endings
from ragdistill.report.hintuse import hint_use
from ragdistill.report.page import Page, render
from ragdistill.report.payback import paybacks
from ragdistill.report.table import policy_table
from ragdistill.timing import Timing
from tests.test_report import EVIL, FAST, episode, measure, study


def played(task: int, won: bool, hints: tuple[str, ...] = (), attempt: int = 0, **changes: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "id": f"{task}-{attempt}-{'+'.join(hints)}", "task_id": f"t{task}", "policy": "p", "agent": "react",
        "attempt": attempt, "seed": 0, "goal": f"goal {task}", "bucket": "b", "group": f"room{task % 2}",
        "kind": f"kind{task % 3}", "hints": tuple(f"text {h}" for h in hints), "hint_ids": hints,
        "steps": (Step(reply="Thought: t\nAction: a", thought="t", action="a", observation=f"seen {task}"),),
        "stop": StopReason.SUCCESS if won else StopReason.LOOP, "reward": float(won),
        "usage": Usage(prompt_tokens=900, completion_tokens=100, computed_tokens=200),
    }  # fmt: skip
    return Trajectory(**{**fields, **changes})


def bank(*ids: str) -> list[Hint]:
    return [Hint(id=i, bucket="b", text=f"text {i}", kind="contrast") for i in ids]


def test_hint_use_counts_the_episodes_that_showed_it() -> None:
    """`a` on t0-t3 (three won), always with `b`; `b` also on t4 (lost); `c` never."""
    taught = [played(t, t < 3, ("a", "b")) for t in range(4)] + [played(4, False, ("b",))]
    rag = [played(t, True, ("b",)) for t in range(10, 12)]
    a, b, c = hint_use(bank("a", "b", "c"), taught, [], rag, FAST)
    assert (a.teacher.episodes, a.teacher.success and a.teacher.success.value) == (4, 0.75)
    assert (b.teacher.episodes, b.teacher.success and b.teacher.success.value) == (5, 0.6)
    assert a.teacher.success is not None
    assert (round(a.teacher.success.lo, 4), round(a.teacher.success.hi, 4)) == (0.3006, 0.9544)
    assert (a.retrieved.episodes, a.retrieved.success, b.retrieved.episodes) == (0, None, 2)
    assert (c.teacher.episodes, c.teacher.success, c.lift, c.together) == (0, None, None, ())
    assert (a.together, b.together) == (("text b",), ())


def test_lift_compares_the_same_tasks_only() -> None:
    """Without hints t0-t3 are won in half of two attempts each; t9 has no hinted attempt and must not count."""
    taught = [played(t, True, ("a",)) for t in range(4)] + [played(7, False, ("a",))]
    unhinted = [played(t, attempt == 0, attempt=attempt) for t in range(4) for attempt in range(2)]
    (use,) = hint_use(bank("a"), taught, [*unhinted, played(9, True)], [], FAST)
    assert use.lift is not None
    assert (use.lift.tasks, use.lift.shown, use.lift.hidden, use.lift.diff.value) == (4, 1.0, 0.5, 0.5)
    assert use.lift.diff.lo <= 0.5 <= use.lift.diff.hi
    assert use.teacher.tasks == 5


def test_lift_has_an_interval_and_ignores_faults_and_hinted_attempts() -> None:
    taught = [played(t, t % 4 > 0, ("a",)) for t in range(20)]
    plain = [played(t, t % 2 > 0) for t in range(20)]
    broken = [played(t, False, stop=StopReason.INFRA_ERROR, attempt=1) for t in range(20)]
    (use,) = hint_use(bank("a"), taught, [*plain, *broken, *taught], [], FAST)
    assert use.lift is not None
    assert use.lift.diff.value == pytest.approx(0.25)
    assert use.lift.diff.lo < 0.25 < use.lift.diff.hi
    (lost,) = hint_use(bank("a"), [played(0, False, ("a",), stop=StopReason.INFRA_ERROR)], plain, [], FAST)
    assert (lost.teacher.episodes, lost.teacher.success, lost.lift) == (0, None, None)


OPENVINO, SERVED = "OpenVINO GenAI 2026.4.1, bfloat16, CPU", "served model <big>"


def text_of(page: Page) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", render(page)).split())


def test_the_page_names_the_engine_and_flags_a_comparison_of_two() -> None:
    m = measure(study())
    same = text_of(Page(m, engines={"base-0": OPENVINO, "distilled-0": OPENVINO}, at_once=32))
    assert f"played by {OPENVINO}" in same and f"Played by {OPENVINO}, up to 32 episodes at once" in same
    assert "Not one comparison" not in same
    two = text_of(Page(m, engines={"base-0": OPENVINO, "rag-0": SERVED, "distilled-0": OPENVINO}))
    assert "Not one comparison" in two
    assert f"{OPENVINO} (base-0, distilled-0); served model &lt;big&gt; (rag-0)" in two
    older = words.played_by({"base-0": OPENVINO, "sft-0": words.UNRECORDED})
    assert older == f"{OPENVINO} (base-0); not recorded (sft-0)"
    assert not words.mixed({"base-0": OPENVINO, "sft-0": words.UNRECORDED})
    assert f"Played by {older}." in policy_table(m | {"engine": older})


def test_wall_time_tells_replays_from_work() -> None:
    times = {
        "rollouts": Timing(seconds=7.0, replayed=1.0, work=480, cold=1900.0),
        "teach@hints": Timing(seconds=7.0, replayed=1.0, work=240),
        "tasks": Timing(seconds=11.0, replayed=0.0, cold=11.0),
        "base": Timing(seconds=1.0),
    }
    assert words.wall_time(times) == [
        ("rollouts", "32 min", "when last run whole; the last run took 7 s, 100 % from the cache"),
        ("tasks", "11 s", ""),
        ("teach@hints", "7 s", "100 % of it from the cache; a whole run was never timed here"),
        ("base", "1 s", "not recorded whether this was a replay"),
    ]
    text = text_of(Page(measure(study()), timings=times))
    assert "Wall time: at least 32 min in all" in text and "Of 2 stages no whole run was timed here" in text
    assert "Wall time: 11 s in all" in text_of(Page(measure(study()), timings={"tasks": times["tasks"]}))


def test_money_stands_on_the_page_where_some_was_paid() -> None:
    def spent(currency: str, money: float, unsure: float = 0.0) -> Spent:
        return Spent(
            stage="rollouts", model="big", currency=currency, paid_calls=1200, money=money, unsure_money=unsure,
        )  # fmt: skip

    text = text_of(Page(measure(study()), spending=[spent("USD", 1.25), spent("USD", 0.5, 0.25), spent("EUR", 2.0)]))
    assert "rollouts big 1,200 0 0 0 1.2500 USD" in text
    assert "1.7500 USD (0.2500 of it at worst, for calls whose bill no server told) and 2.0000 EUR in all" in text
    assert "What served models were paid" not in text_of(Page(measure(study())))


def test_latency_is_a_step_s_not_only_an_episode_s() -> None:
    """Ten episodes of ten steps, of one to ten seconds; a faulty one and one without a step do not count."""
    played = [(10, float(t)) for t in range(1, 11)] + [(0, 9.0)]
    episodes = [episode("base", t, False, steps=n, seconds=s) for t, (n, s) in enumerate(played)]
    episodes.append(episode("base", 99, False, steps=1, seconds=500.0, stop=StopReason.INFRA_ERROR))
    row = measure(episodes)["policies"]["base"]
    assert (row["step_seconds_p50"], row["step_seconds_p95"]) == (0.55, 0.955)
    assert "Latency of a step" in text_of(Page(measure(episodes)))
    nothing = measure([episode("base", t, False, steps=0) for t in range(4)])
    assert "step_seconds_p50" not in nothing["policies"]["base"]
    assert "Latency of a step" not in text_of(Page(nothing))


def test_groups_of_a_task_or_two_are_no_rooms_to_look_at() -> None:
    of_three, of_two = ([episode("base", t, False, group=f"room{t // n}") for t in range(12)] for n in (3, 2))
    assert ">By room<" in render(Page(measure(of_three)))
    assert ">By room<" not in render(Page(measure(of_two)))


def test_a_group_is_called_what_the_environment_calls_it() -> None:
    m = measure([episode("base", t, False, group=f"place{t // 3}") for t in range(60)])
    rooms, products = (re.sub(r"<script.*?</script>|<style.*?</style>", "", render(page), flags=re.DOTALL) for page in (
        Page(m), Page(m, group="product")
    ))  # fmt: skip
    assert rooms.count("room") > 10 < products.count("product")
    said = re.sub(r"<[^>]*>", "", products)
    assert "room" not in said.lower() and ">By product<" in products and "8 more products" in said
    settings = load_params(Path(__file__).parents[1] / "params.yaml").env
    names = {
        n: defaults_of(make_domain(msgspec.structs.replace(settings, name=n))).group for n in ("alfworld", "webshop")
    }
    assert names == {"alfworld": "room", "webshop": "product"} and Defaults().group == "group"


def test_every_table_that_scrolls_can_be_reached_by_keyboard_and_has_a_name_and_a_head() -> None:
    m = measure([episode("base", t, False, group=f"room{t % 13}") for t in range(40)])
    many = [Hint(id=str(i), bucket="b", text=f"text {i}", kind="contrast") for i in range(9)]
    html = render(Page(m, hints=many))
    scrolls = re.findall(r'<div class="scroll"([^>]*)>\s*<table[^>]*>\s*(<\w+>)', html)
    assert len(scrolls) >= 5
    names = [re.search(r'tabindex="0" role="group" aria-label="([^"]+)"', attributes) for attributes, _ in scrolls]
    assert all(names) and {first for _, first in scrolls} == {"<thead>"}
    assert len({n.group(1) for n in names if n}) == len(scrolls), "no two tables have the same name"


def test_every_stop_reason_has_a_part_of_its_bar_and_a_colour_of_its_own() -> None:
    games = [played(i, False, stop=reason) for i, reason in enumerate(StopReason)]
    (ending,) = endings({"base": games})
    assert {(name, n) for name, n, _ in ending.parts} == {(reason.value, 1) for reason in StopReason}
    css = (Path(figures.__file__).parent / "page.css").read_text()
    colours = [re.findall(rf"\.end-{reason.value} {{ background: (#\w+); }}", css) for reason in StopReason]
    assert all(len(found) == 1 for found in colours) and len({found[0] for found in colours}) == len(StopReason)


def evaluated(policy: str, tokens: int) -> list[EvalEpisode]:
    return [
        EvalEpisode(
            policy=policy, seed=0, task_id=f"t{i}", kind="k", bucket="k", group="g", success=True, score=1.0, steps=5,
            invalid=0, tokens_billed=tokens, tokens_computed=tokens // 10, tokens_completion=9, seconds=1.0,
            stop=StopReason.SUCCESS,
        )
        for i in range(6)
    ]  # fmt: skip


def test_payback_is_what_was_spent_over_what_is_saved() -> None:
    """12 attempts and 6 hinted ones of 1,000 billed tokens, 500 tokens trained twice; rag 700, distilled 500."""
    rollouts, taught = [played(t, True) for t in range(12)], [played(t, True, ("a",)) for t in range(6)]
    training = {"tokens": 500, "lora": {"epochs": 2}}
    billed, computed = paybacks(rollouts, taught, training, evaluated("rag", 700) + evaluated("distilled", 500), FAST)
    assert (billed.rollouts, billed.teacher, billed.training, billed.spent) == (12_000, 6_000, 1_000, 19_000)
    assert (billed.saved.value, billed.episodes, billed.soonest, billed.latest) == (200, 95, 95, 95)
    assert billed.given_bank == 35
    assert (computed.rollouts, computed.saved.value, computed.tasks) == (2_400, 20, 6)


def test_nothing_saved_is_never_paid_back() -> None:
    rollouts, taught = [played(0, True)], [played(0, True, ("a",))]
    training = {"tokens": 500, "lora": {"epochs": 2}}
    found = paybacks(rollouts, taught, training, evaluated("rag", 500) + evaluated("distilled", 700), FAST)
    assert [(p.episodes, p.latest, p.soonest, p.given_bank) for p in found] == [(None, None, None, None)] * 2
    assert any("never" in value for _, value, _ in words.facts(measure(study()), found))
    assert paybacks(rollouts, taught, training, evaluated("rag", 500), FAST) == []
    assert paybacks([], taught, training, evaluated("rag", 500) + evaluated("distilled", 500), FAST) == []


def replay(data: dict[str, Any], part: int, row: dict[str, Any]) -> tuple[str, list[tuple[str, str, str, bool]]]:
    """A stored episode, read back."""
    texts, steps = data["texts"], row["steps"]
    rows = [steps[i : i + 6] for i in range(0, len(steps), 6)]
    goal = data["sets"][part]["tasks"][row["t"]]["goal"]
    return goal, [(texts[t], texts[a], texts[o], bool(v)) for t, a, o, _, v, _ in rows]


def test_stored_games_are_the_played_ones_and_texts_stand_once() -> None:
    episodes = [played(t, t % 2 == 0, ("a",)) for t in range(9)]
    data = json.loads(script_json(browser_data([GameSet("g", {"p": episodes})])))
    assert len(set(data["texts"])) == len(data["texts"])
    by_id = {row["id"]: row for row in data["sets"][0]["episodes"]}
    for t in episodes:
        row = by_id[t.id]
        expected = [(s.thought, s.action, s.observation, s.valid) for s in t.steps]
        assert replay(data, 0, row) == (t.goal, expected)
        assert (row["won"], row["n"], row["billed"]) == (int(t.success), 1, 1000)
        assert [data["texts"][h] for h in row["hints"]] == ["text a"]


def test_a_reply_is_kept_where_it_holds_more_than_thought_and_action() -> None:
    odd = Step(reply="I would rather not play this game today.", thought="", action="", observation="No action found.")
    more = Step(reply="Thought: t\nAction: a\n" + "and then " * 9, thought="t", action="a", observation="o")
    data = browser_data([GameSet("g", {"p": [played(0, False, steps=(odd, more, played(1, True).steps[0]))]})])
    replies = data["sets"][0]["episodes"][0]["steps"][3::6]
    assert [data["texts"][r] if r >= 0 else None for r in replies] == [odd.reply, more.reply, None]


def test_what_does_not_fit_is_left_out_by_whole_games_over_all_kinds() -> None:
    episodes = [
        played(t, True, attempt=a, steps=(Step(reply="", thought="x" * 900, action="a", observation=f"{t}{a}"),))
        for t in range(300) for a in range(2)
    ]  # fmt: skip
    sources = {"p": episodes[::2], "q": episodes[1::2]}
    rare = frozenset({episodes[-1].id})
    data = browser_data([GameSet("g", sources, rare), GameSet("h", sources)], budget=60_000)
    first, second = data["sets"]
    assert 30 < first["shown"] < 300
    assert (first["of"], second["of"]) == (300, 300)
    assert second["shown"] > 10, "the second set has its own share"
    assert len(script_json(data)) < 61_000
    assert len(first["episodes"]) == 2 * first["shown"]
    kinds = [t["kind"] for t in first["tasks"]]
    assert max(map(kinds.count, set(kinds))) - min(map(kinds.count, set(kinds))) <= 1
    assert "t299" in {t["id"] for t in first["tasks"]}, "evidence is kept first"


def test_training_attempts_are_sources_of_their_own() -> None:
    got = training_sources([played(0, True, attempt=1), played(0, True)], [played(0, True, ("a",))])
    assert {k: len(v) for k, v in got.items()} == {
        "no hints, attempt 1": 1, "no hints, attempt 2": 1, "with hints, attempt 1": 1,
    }  # fmt: skip


def test_script_json_holds_nothing_that_html_reads() -> None:
    text = script_json({"x": f"</script><!--&amp;{EVIL}\u2028"})
    assert not set("<>&") & set(text)
    assert json.loads(text)["x"] == f"</script><!--&amp;{EVIL}\u2028"


def test_page_says_association_sample_and_temperatures() -> None:
    taught = [played(t, True, ("a", "b")) for t in range(4)]
    page = Page(
        measure(study()), hints=bank("a", "b"), taught=taught, rollouts=[played(t, False) for t in range(8)],
        temperatures={"rollouts": 0.7, "teach": 0.3}, bootstrap=200,
    )  # fmt: skip
    html = render(page)
    assert "associations, not effects" in html
    assert "temperature 0.7" in html and "ones at 0.3" in html
    assert "only on some of the training tasks" in html
    assert "Always shown together with: “text b”" in html
    assert "+100" in html and "100 % against 0 %, 4 tasks" in html


def test_page_gives_what_a_hint_does_alone_where_that_was_measured() -> None:
    row = LiftRow(
        hint_id="a", bucket="clean", text="text a", tasks=16, attempts=16, shown=0.5, hidden=0.25, diff=0.25, lo=0.05,
        hi=0.45, p=0.1,
    )  # fmt: skip
    plain = render(Page(measure(study()), hints=bank("a", "b"), bootstrap=200))
    html = render(Page(measure(study()), hints=bank("a", "b"), measured=[row], bootstrap=200))
    assert "Alone, against no hint" not in plain and "the only one shown" not in plain
    assert html.count("Alone, against no hint: +25 [+5, +45] points on 16 training tasks, 50 % against 25 %") == 1
