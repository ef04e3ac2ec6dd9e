"""Strip: hints never reach the training chats, turns are never lost, and the report says what happened."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragdistill.agents.hint_block import HEADER, render_hints
from ragdistill.errors import DataError, EmptyResultError
from ragdistill.params import StripParams
from ragdistill.records import Message, SftExample, Step, StopReason, Trajectory
from ragdistill.strip import assert_hint_free, refers_to_hint, strip

PARAMS = StripParams(max_invalid=2, min_score=None, on_hint_reference="drop_thought", per_task=1)
HINT = "To finish, take {object}, then clean {object} with {sinkbasin} before you move {object} to {target}."
SKILL = "I need clean potato. I clean it with the sinkbasin"


def render(t: Trajectory) -> tuple[Message, ...]:
    """A small agent: everything from fields, hints included if there are any."""
    chat = [Message(role="user", content="\n".join(filter(None, (t.first_observation, render_hints(t.hints)))))]
    for s in t.steps:
        lead = f"Thought: {s.thought}\n" if s.thought else ""
        chat += [Message(role="assistant", content=f"{lead}Action: {s.action}")]
        chat += [Message(role="user", content=s.observation)]
    return tuple(chat)


def episode(
    name: str = "a", *, task: str = "t", thoughts: tuple[str, ...] = (SKILL,), invalid: int = 0,
    stop: StopReason = StopReason.SUCCESS, hints: tuple[str, ...] = (HINT,), reward: float = 1.0,
) -> Trajectory:  # fmt: skip
    acts = ["take potato 1 from shelf 2", "clean potato 1 with sinkbasin 1", "move potato 1 to fridge 1"]
    steps = [Step(reply="r", thought="", action="jump", observation="Nothing happens.", valid=False)] * invalid
    for i, a in enumerate(acts):
        thought = thoughts[i % len(thoughts)] if thoughts else ""
        steps.append(Step(reply=f"Thought: {thought}\nAction: {a}", thought=thought, action=a, observation="ok."))
    return Trajectory(
        id=name, task_id=task, policy="teach", agent="react", attempt=0, seed=0, goal="put a clean potato in fridge.",
        bucket="clean", group="g", kind="k", hints=hints, hint_ids=("h",) * len(hints), steps=tuple(steps), stop=stop,
        first_observation="You see a fridge 1, a sinkbasin 1, a shelf 2, a potato 1.", reward=reward,
    )  # fmt: skip


def test_the_hint_is_not_rendered_but_the_learned_skill_stays() -> None:
    (example,), report = strip([episode()], PARAMS, render)
    whole = "\n".join(m.content for m in example.messages)
    assert HINT not in whole and HEADER not in whole
    assert SKILL in whole
    assert (report.kept, report.hinted, report.instantiating, report.thoughts_dropped) == (1, 1, 1.0, 0)
    assert report.trigrams_in_actions and report.trigrams_in_thoughts is not None


def test_each_filter_is_counted_under_its_reason() -> None:
    rows = [
        episode("won"), episode("slow", invalid=1), episode("lost", stop=StopReason.MAX_STEPS),
        episode("dead", stop=StopReason.INFRA_ERROR), episode("clumsy", task="u", invalid=3),
    ]  # fmt: skip
    examples, report = strip(rows, PARAMS, render)
    assert [e.trajectory_id for e in examples] == ["won"]
    assert report.dropped == {"more_than_per_task": 1, "no_success": 1, "infra_error": 1, "too_many_invalid": 1}
    assert report.trajectories == report.kept + sum(report.dropped.values())
    unlimited = msgspec.structs.replace(PARAMS, max_invalid=None, per_task=5)
    assert [e.trajectory_id for e in strip(rows, unlimited, render)[0]] == ["won", "slow", "clumsy"]


def test_a_least_score_lets_finished_episodes_in_and_no_others() -> None:
    lost = StopReason.FAILURE
    rows = [
        episode("full"), episode("fair", task="u", stop=lost, reward=0.67), episode("poor", stop=lost, reward=2 / 3),
        episode("cut", task="v", stop=StopReason.MAX_STEPS, reward=0.9), episode("none", task="w", stop=lost, reward=0),
        episode("loop", task="x", stop=StopReason.LOOP, reward=1.0),
    ]  # fmt: skip
    assert [e.trajectory_id for e in strip(rows, PARAMS, render)[0]] == ["full"]
    least = msgspec.structs.replace(PARAMS, min_score=0.67)
    examples, report = strip(rows, least, render)
    assert [e.trajectory_id for e in examples] == ["full", "fair"]
    assert report.dropped == {"low_score": 4}
    every = strip(rows, msgspec.structs.replace(PARAMS, min_score=0.0, per_task=9), render)[0]
    assert [e.trajectory_id for e in every] == ["full", "poor", "fair", "none"]
    assert [e.trajectory_id for e in strip(rows[:1], msgspec.structs.replace(PARAMS, min_score=1.0), render)[0]]


def test_a_better_score_beats_fewer_steps_where_scores_count() -> None:
    quick, full = episode("quick", stop=StopReason.FAILURE, reward=0.8), episode("full", invalid=2)
    for rows in ([quick, full], [full, quick]):
        (kept,), report = strip(rows, msgspec.structs.replace(PARAMS, min_score=0.5), render)
        assert (kept.trajectory_id, report.dropped) == ("full", {"more_than_per_task": 1})


def test_fewer_steps_win_then_the_id_and_input_order_does_not_matter() -> None:
    rows = [episode("c"), episode("b"), episode("a", invalid=1), episode("z", task="s")]
    expected = [e.trajectory_id for e in strip(rows, PARAMS, render)[0]]
    assert expected == ["z", "b"]
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert [e.trajectory_id for e in strip(rows, PARAMS, render)[0]] == expected


@pytest.mark.parametrize(
    "thought",
    ["The hint says to clean it.", "According to the hint I go on.", "As hinted, wash.", "Good advice.", "A tip: wash.",
     "I clean {object} with {sinkbasin}", f"So: {HINT.upper()}"],
)  # fmt: skip
def test_a_thought_about_hints_goes_and_its_turn_stays(thought: str) -> None:
    rows = [episode(thoughts=(thought, SKILL, ""))]
    (example,), report = strip(rows, PARAMS, render)
    said = [m.content for m in example.messages if m.role == "assistant"]
    assert said[0] == "Action: take potato 1 from shelf 2"
    assert said[1].startswith(f"Thought: {SKILL}") and len(said) == 3
    assert (report.thoughts, report.thoughts_dropped) == (2, 1)
    strict = msgspec.structs.replace(PARAMS, on_hint_reference="drop_trajectory")
    with pytest.raises(EmptyResultError, match="hint_reference"):
        strip(rows, strict, render)


def test_a_word_of_the_environment_is_no_reference() -> None:
    assert refers_to_hint("I click the tip", ())
    assert not refers_to_hint("I click the felt tip pen", (), seen="Felt tip pen, black")
    assert not refers_to_hint("I must multiply and sip tea", ())
    assert refers_to_hint("Open drawers first, I read.", ("Open drawers  first",))


def test_a_renderer_that_shows_hints_or_dropped_thoughts_is_refused() -> None:
    def leaky(t: Trajectory) -> tuple[Message, ...]:
        return (*render(t), Message(role="user", content=f"psst: {HINT}"))

    def verbatim(t: Trajectory) -> tuple[Message, ...]:
        return tuple(Message(role="assistant", content=s.reply) for s in t.steps)

    with pytest.raises(DataError, match="without hints"):
        strip([episode()], PARAMS, leaky)
    with pytest.raises(DataError, match="thought and action"):
        strip([episode(thoughts=("the hint says so",))], PARAMS, verbatim)


def test_the_proof_sees_through_case_and_spacing_in_any_role() -> None:
    for role in ("system", "user", "assistant"):
        chat = (Message(role=role, content="x  " + HINT.upper().replace(" ", "\n") + " y"),)
        example = SftExample(id="e", messages=chat, task_id="t", trajectory_id="a", source="p", bucket="b")
        with pytest.raises(DataError, match="clean"):
            assert_hint_free([example], [HINT])
        assert_hint_free([example], ["another hint", "  "])


def test_nothing_left_says_what_to_change() -> None:
    with pytest.raises(EmptyResultError, match=r"teach\.attempts"):
        strip([episode(stop=StopReason.MAX_STEPS)], PARAMS, render)


def test_overlap_tells_followed_hints_from_ignored_ones() -> None:
    followed = strip([episode()], PARAMS, render)[1]
    ignored = strip([episode(hints=("To finish, heat {object} with {microwave}.",))], PARAMS, render)[1]
    place = strip([episode(hints=("Always take {object} from {place} first.",))], PARAMS, render)[1]
    assert (followed.instantiating, ignored.instantiating, place.instantiating) == (1.0, 0.0, None)
    assert ignored.trigrams_in_actions == 0.0 < (followed.trigrams_in_actions or 0.0)
    plain = strip([episode(hints=())], PARAMS, render)[1]
    assert (plain.hinted, plain.instantiating, plain.trigrams_in_thoughts) == (0, None, None)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.text(max_size=40), min_size=1, max_size=3),
    st.text(max_size=40),
    st.lists(st.text(max_size=30), max_size=2),
)
def test_any_text_is_survived_and_no_turn_is_lost(thoughts: list[str], observation: str, hints: list[str]) -> None:
    t = episode(thoughts=tuple(thoughts), hints=tuple(hints))
    steps = tuple(msgspec.structs.replace(s, observation=observation) for s in t.steps)
    t = msgspec.structs.replace(t, steps=steps)
    own = [*(s.action for s in t.steps), observation, t.first_observation]
    if any(" ".join(h.lower().split()) in " ".join(o.lower().split()) for h in hints if h.strip() for o in own):
        with pytest.raises(DataError, match=r"shows the hint|a dropped thought shows"):
            strip([t], PARAMS, render)
        return
    (example,), report = strip([t], PARAMS, render)
    assert [m.role for m in example.messages].count("assistant") == len(t.steps)
    assert report.kept == 1
