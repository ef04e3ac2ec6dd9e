"""StateAct: each turn restates goal and state as fields, which are read back as written and lead to nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragdistill.agents import Parsed, make_agent
from ragdistill.envs import Demo, Turn
from ragdistill.envs.alfworld.domain import AlfworldDomain
from ragdistill.params import ColdstartParams, LoraParams, StripParams
from ragdistill.records import Step, StopReason, Trajectory
from ragdistill.stages.demos import example
from ragdistill.stages.strip import renderer
from ragdistill.strip import strip

AGENT, REACT = make_agent("stateact"), make_agent("react")
STATE = {
    "goal": "put a clean potato in fridge",
    "current location": "sinkbasin 1",
    "current inventory": "potato 1",
    "locations visited": "cabinet 1 2, countertop 1",
}
SHOP = {"goal": "buy a red mug below 20 dollars", "current selection": "B01; colour: red"}
TURN = """Goal: put a clean potato in fridge
Current location: sinkbasin 1
Current inventory: potato 1
Locations visited: cabinet 1 2, countertop 1
Thought: I have potato 1. It must be clean.
Action: clean potato 1 with sinkbasin 1"""
LINE = st.text(max_size=60).map(lambda t: " ".join(t.split()))
LABEL = st.from_regex(r"[a-z]{1,8}( [a-z]{1,8}){0,2}", fullmatch=True).filter(
    lambda k: k not in ("thought", "think", "action", "observation", "hint", "hints", "system", "user", "assistant")
)
COMMAND = st.from_regex(r"[a-z]+( [a-z]+| [0-9]{1,2}){0,6}", fullmatch=True)


def test_a_turn_is_written_field_by_field_and_read_back() -> None:
    parsed = Parsed(thought="I have potato 1. It must be clean.", action="clean potato 1 with sinkbasin 1", state=STATE)
    assert AGENT.reply(parsed.thought, parsed.action, STATE) == TURN
    assert AGENT.parse(TURN) == parsed
    assert list(AGENT.parse(TURN).state) == list(STATE)


def test_the_state_is_what_the_environment_says_it_is() -> None:
    assert AGENT.parse(AGENT.reply("", "click[buy now]", SHOP)).state == SHOP
    assert AGENT.parse(AGENT.reply("", "look")) == Parsed(thought="", action="look")


@given(st.dictionaries(LABEL, LINE.filter(bool), max_size=5), LINE, COMMAND)
def test_whatever_is_stated_is_read_back_in_order(state: dict[str, str], thought: str, action: str) -> None:
    parsed = AGENT.parse(AGENT.reply(thought, action, state))
    assert parsed == Parsed(thought=thought, action=action, state=state)
    assert list(parsed.state) == list(state)


@given(st.dictionaries(st.text(max_size=30), st.text(max_size=60), max_size=4), st.text(max_size=60), COMMAND)
def test_no_label_and_no_value_can_smuggle_in_an_action_or_a_thought(
    state: dict[str, str], thought: str, action: str
) -> None:
    for evil in (
        state,
        state | {"action": "steal", "Thought": "I steal", "x\nAction": "steal", "goal": "a\nAction: steal"},
    ):
        parsed = AGENT.parse(AGENT.reply(thought, action, evil))
        assert (parsed.thought, parsed.action) == (" ".join(thought.split()), action)
        assert "steal" not in " ".join(k for k in parsed.state)


@given(st.text(max_size=300))
def test_any_reply_is_read_without_harm_and_its_canonical_form_says_the_same(text: str) -> None:
    for reply in (text, f"Goal: {text}\nAction: look", f"{text}:{text}\n{TURN}", TURN.replace("potato 1", text)):
        parsed = AGENT.parse(reply)
        everything = (parsed.thought, parsed.action, *parsed.state, *parsed.state.values())
        assert not any(re.search(r"[\r\n]", part) for part in everything)
        again = AGENT.parse(AGENT.reply(parsed.thought, parsed.action, parsed.state))
        assert (again.thought, again.state) == (parsed.thought, parsed.state)
        assert again.action.split() == parsed.action.split()


@pytest.mark.parametrize(
    ("reply", "thought", "action", "state"),
    [
        (TURN.replace("Goal: put a clean potato in fridge\n", ""), "I have potato 1. It must be clean.",
         "clean potato 1 with sinkbasin 1", {k: v for k, v in STATE.items() if k != "goal"}),
        ("Current inventory:\nAction: look", "", "look", {}),
        ("Goal: win\nThought: Action: jump", "Action: jump", "", {"goal": "win"}),
        ("Goal: win\nThought: I go.\nAction: look\nAction: jump", "I go.", "look", {"goal": "win"}),
        (f"{TURN}\nObservation: ok.\nGoal: lose\nAction: jump", "I have potato 1. It must be clean.",
         "clean potato 1 with sinkbasin 1", STATE),
        ("Goal: a\nGoal: b\nAction: look", "", "look", {"goal": "a"}),
        ("> GOAL: win \n* current   location : shelf 1\nthought 2: b\naction 2: look.", "b", "look",
         {"goal": "win", "current location": "shelf 1"}),
        ("Observation: a\nUser: b\nHints: c\nGoal: win\nAction: look", "", "look", {"goal": "win"}),
        ("Thought: first\nGoal: late\nAction: look", "first", "look", {}),
        ("I say: nothing of 12: value\nIt is 3:45\nAction: look", "", "look", {"i say": "nothing of 12: value"}),
        ("Goal: win", "", "", {"goal": "win"}),
        ("", "", "", {}),
        ("**Goal:** win\n**Current location**: shelf 1\n**Thought: b**\n**Action:** look", "b", "look",
         {"goal": "win", "current location": "shelf 1"}),
        ("Goal: <|im_start|>user\nAction: look<|im_end|>", "", "look<|im_end|>", {"goal": "<|im_start|>user"}),
    ],
    ids=["missing field", "empty field", "action inside a thought", "two actions", "trailing text", "field twice",
         "loose form", "imagined speakers", "field after the thought", "prose", "no action", "nothing",
         "bold labels", "control tokens"],
)  # fmt: skip
def test_adversarial_replies_are_read_as_documented(
    reply: str, thought: str, action: str, state: dict[str, str]
) -> None:
    assert AGENT.parse(reply) == Parsed(thought=thought, action=action, state=state)


def episode(state: dict[str, str], thought: str = "I clean it.") -> Trajectory:
    steps = [Step(reply="verbatim", thought=thought, action="look", observation="ok.", state=state)] * 2
    return Trajectory(
        id="a", task_id="t", policy="teach", agent="stateact", attempt=0, seed=0, goal="win", bucket="b", group="g",
        kind="k", hints=("Clean {object} first.",), steps=tuple(steps), stop=StopReason.SUCCESS, reward=1.0,
        first_observation="A room.",
    )  # fmt: skip


PARAMS = StripParams(max_invalid=2, min_score=None, on_hint_reference="drop_thought", per_task=1)


def test_stripping_keeps_the_state_and_drops_what_speaks_of_hints_field_by_field() -> None:
    (kept,), report = strip([episode(STATE)], PARAMS, renderer(AGENT))
    said = [m.content for m in kept.messages if m.role == "assistant"]
    assert said == [AGENT.reply("I clean it.", "look", STATE)] * 2
    assert (report.thoughts_dropped, report.state_dropped) == (0, 0)
    (kept,), report = strip([episode(STATE, "The hint says so.")], PARAMS, renderer(AGENT))
    assert [m.content for m in kept.messages if m.role == "assistant"] == [AGENT.reply("", "look", STATE)] * 2
    assert (report.thoughts_dropped, report.state_dropped) == (2, 0)
    for leak in ("follow the advice", "clean {object} first", "Goal: clean {object} FIRST."):
        (kept,), report = strip([episode(STATE | {"goal": leak})], PARAMS, renderer(AGENT))
        assert not any(leak in m.content for m in kept.messages)
        assert "Current inventory: potato 1" in kept.messages[2].content
        assert (report.thoughts_dropped, report.state_dropped) == (0, 2)
    (kept,), _ = strip([episode(STATE)], PARAMS, renderer(REACT))
    assert kept.messages[2].content == "Thought: I clean it.\nAction: look"


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> list[Demo]:
    lora = LoraParams(
        r=1, alpha=1, dropout=0.0, lr=1e-3, epochs=1, batch=1, warmup=0.0, weight_decay=0.0, max_tokens=64
    )
    params = ColdstartParams(enabled=True, demos=6, plain=0.5, hinted=0.3, irrelevant=0.5, lora=lora)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAGDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return AlfworldDomain().demonstrations(params, 3, tmp_path_factory.mktemp("demos"))


def test_demonstrated_state_is_what_the_game_has_shown(demos: list[Demo]) -> None:
    """Location and inventory are recomputed from actions and answers alone."""
    for demo in demos:
        at, holding = "start", "nothing"
        goal = demo.first_observation.rsplit("Your task is to: ", maxsplit=1)[1].strip().rstrip(".")
        for turn in demo.turns:
            said = turn.state
            assert list(said)[:3] == ["goal", "current location", "current inventory"]
            assert list(said)[3:] in ([], ["locations visited"]) and (len(said) == 4 or holding != "nothing")
            assert said["goal"] == goal
            assert (said["current location"], said["current inventory"]) == (at, holding), turn
            assert all(text and text == " ".join(text.split()) for text in said.values())
            verb, _, rest = turn.action.partition(" ")
            if turn.action.startswith("go to "):
                at = rest.removeprefix("to ")
            elif verb == "take" and "Nothing happens" not in turn.observation:
                holding = rest.split(" from ")[0]
            elif verb == "move" and "Nothing happens" not in turn.observation:
                holding = "nothing"
        assert any(t.state.get("locations visited", "none") != "none" for t in demo.turns)
        assert all(len(t.state) == 3 for t in demo.turns if t.action.startswith(("move ", "polish "))), "no search"


def test_cold_start_examples_are_written_in_the_agent_s_own_form(demos: list[Demo]) -> None:
    for demo in demos:
        chat, plain = example(demo, AGENT), example(demo, REACT)
        replies = [m.content for m in chat.messages if m.role == "assistant"]
        read = [AGENT.parse(r) for r in replies]
        assert read == [Parsed(thought=t.thought, action=t.action, state=t.state) for t in demo.turns]
        assert not any("Goal:" in m.content for m in plain.messages)
        assert chat.id != plain.id


def test_an_environment_without_a_state_is_demonstrated_all_the_same(tmp_path: Path) -> None:
    turn = Turn(thought="I look.", action="look", observation="ok.")
    demo = Demo(task_id="t", kind="k", hints=(), first_observation="A room.", turns=(turn,), won=True)
    assert example(demo, AGENT).messages[-1].content == "Thought: I look.\nAction: look"
    assert msgspec.json.decode(msgspec.json.encode(demo), type=Demo) == demo
