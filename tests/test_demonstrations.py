"""Demonstrations: they teach the interface, withhold the real rules, and say at every turn what they need."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragdistill.agents import Parsed, make_agent
from ragdistill.envs import Demo
from ragdistill.envs.alfworld.demonstrator import Demonstrator, Need, likelihood_order
from ragdistill.envs.alfworld.domain import MAX_TURNS, AlfworldDomain, draw_hints, mixture
from ragdistill.envs.alfworld.games import GAME_FILE, Game, read_game
from ragdistill.envs.alfworld.goals import (
    DEV,
    FORBIDDEN,
    HOUSE_AT,
    HOUSE_KINDS,
    HOUSE_WITH,
    PICK,
    TEST,
    TRAIN,
    TWO,
)
from ragdistill.envs.alfworld.houserules import FIXTURES, GENERIC, VOCABULARY, WITHHELD
from ragdistill.envs.alfworld.rooms import load_room, priors
from ragdistill.envs.alfworld.splits import plan_split
from ragdistill.envs.paraphrase import rule_hint
from ragdistill.errors import ContaminationError
from ragdistill.params import ColdstartParams, LoraParams
from ragdistill.stages.demos import example

OPERATIONS = ("clean", "heat", "cool", "use", "slice", "help")
"""Commands of the real games that no demonstration plays."""
RULES = {*WITHHELD, "cleaned", "heated", "cooled", "lamp", "desklamp", "floorlamp", "lit"}
LORA = LoraParams(r=1, alpha=1, dropout=0.0, lr=1e-3, epochs=1, batch=1, warmup=0.0, weight_decay=0.0, max_tokens=64)


def params(demos: int, plain: float = 0.25, hinted: float = 0.4, irrelevant: float = 0.6) -> ColdstartParams:
    return ColdstartParams(enabled=True, demos=demos, plain=plain, hinted=hinted, irrelevant=irrelevant, lora=LORA)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Demo, Game]]:
    """Demonstrations as the stage makes them, each with its game."""
    out = tmp_path_factory.mktemp("demos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAGDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        demos = AlfworldDomain().demonstrations(params(16), 1, out)
    return [(d, read_game(out / d.task_id / GAME_FILE)) for d in demos]


def goal(demo: Demo) -> str:
    return demo.first_observation.lower().rsplit("your task is to:", maxsplit=1)[1].strip().rstrip(".")


def told(demo: Demo, game: Game) -> bool:
    """Whether the demonstration was shown its own rule."""
    assert game.meta
    rule = game.rule and game.rule.command("{object}", f"{{{game.meta.tool}}}")
    return rule is not None and any(rule.lower() in h.lower() for h in demo.hints)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def test_the_sample_holds_what_the_tests_below_speak_of(made: list[tuple[Demo, Game]]) -> None:
    assert len(made) == 16
    assert {d.kind for d, _ in made} == {PICK, TWO, HOUSE_WITH, HOUSE_AT}
    rules = [(d.kind, told(d, g)) for d, g in made if g.rule]
    assert set(rules) == {(kind, shown) for kind in HOUSE_KINDS for shown in (True, False)}
    assert any(d.hints for d, g in made if not g.rule), "some see hints that do not apply"


def test_withheld_operations_are_never_played_and_never_asked_for(made: list[tuple[Demo, Game]]) -> None:
    for demo, _ in made:
        assert not [t.action for t in demo.turns if t.action.split()[0] in OPERATIONS]
        assert not words(goal(demo)) & RULES, goal(demo)
        thoughts = words(" ".join(t.thought for t in demo.turns))
        assert not thoughts & (RULES - {"look"}), thoughts & RULES


def test_hints_never_name_a_withheld_operation_and_thoughts_never_speak_of_hints(made: list[tuple[Demo, Game]]) -> None:
    command = re.compile(rf"\b(?:{'|'.join(OPERATIONS)})\b \{{|lamp", re.IGNORECASE)
    assert command.search("To finish, Clean {object} with {sinkbasin}.")
    for demo, game in made:
        drawn = [h for seed in range(60) for h in draw_hints(game, True, random.Random(seed), 1.0)]
        for hint in (*demo.hints, *drawn):
            assert not command.search(hint), hint
        assert "hint" not in " ".join(t.thought for t in demo.turns).lower()


def test_no_rule_word_is_a_withheld_one() -> None:
    assert not {w for pair in VOCABULARY + GENERIC for w in pair} & RULES
    assert len({v for v, _ in VOCABULARY + GENERIC}) == len(VOCABULARY + GENERIC)


def test_tools_that_stand_somewhere_are_objects_alfworld_does_not_have(made: list[tuple[Demo, Game]]) -> None:
    known = {t.lower() for plan in (1, 201, 301, 401) for t in load_room(plan).object_types} | {*priors()["pickupable"]}
    assert not {f.lower() for f in FIXTURES} & ({k.lower() for k in known} | RULES)
    tools = {g.meta.tool for d, g in made if d.kind == HOUSE_AT and g.meta}
    assert tools and tools <= {f.lower() for f in FIXTURES}


def test_every_thought_restates_what_is_still_needed(made: list[tuple[Demo, Game]]) -> None:
    for demo, game in made:
        for turn in demo.turns:
            assert any(form in turn.thought for form in forms_of_need(demo, game)), turn


def forms_of_need(demo: Demo, game: Game) -> list[str]:
    meta, rule = game.meta, game.rule
    assert meta
    obj, place = meta.target, meta.destination
    if rule is None:
        return [f"I need {n}{obj} in {place}." for n in ("", "1 ", "2 ")] + [f"I put it in {place}."]
    word = rule.adjective if rule.adjective in words(goal(demo)) else rule.verb
    held = [f"I have {obj} {n}. I " for n in range(1, 6)]
    if demo.kind == HOUSE_AT:
        need = f"{obj}, then {rule.verb} {meta.tool}" if told(demo, game) else f"{obj} with {meta.tool}"
        find = f"{rule.verb} {meta.tool}" if told(demo, game) else meta.tool
        tries = [h + t for h in held for t in ("try to ", f"{rule.verb} it.", f"need {find}.")]
        return [f"I need {need}.", *tries]
    done = [f"{obj} {n} is {word}. I put it in {place}." for n in range(1, 6)]
    if told(demo, game):
        operation = f"{rule.verb} with {meta.tool}"
        return [f"I need {obj}, then {operation}, in {place}.", *(f"{h}{operation}." for h in held), *done]
    musts = [f"{obj} {n} must be {word}." for n in range(1, 6)]
    return [f"I need {word} {obj} in {place}.", *musts, *done]


def test_thoughts_say_whether_the_agent_goes_to_a_tool_or_stands_at_it(made: list[tuple[Demo, Game]]) -> None:
    for demo, game in made:
        for turn in demo.turns:
            if game.rule and game.rule.form == "with" and turn.action.startswith(game.rule.verb + " "):
                assert turn.thought.startswith(f"I am at {turn.action.split(' with ')[1]}."), turn
            assert (
                turn.action.startswith("go to ") == bool(re.search(r"I (?:look in|go to|saw|put it)", turn.thought))
                or "I put it in" in turn.thought
            ), turn


def test_what_was_seen_on_the_way_is_said_with_its_place_and_fetched_later() -> None:
    player = Demonstrator(Need(object="mug", target="bed", count=2), {"mug": ["desk"]})
    replies = [
        "You see a desk 1, a bed 1.\n\nYour task is to: put two mug in bed.",
        "You arrive at desk 1. On the desk 1, you see a mug 2, and a mug 1.",
        "You pick up the mug 2 from the desk 1.", "You arrive at bed 1. On the bed 1, you see nothing.", "You move it.",
    ]  # fmt: skip
    thoughts, actions = zip(*(player.act(r) for r in replies), strict=True)
    assert thoughts[1] == "I found mug 2 and mug 1 at desk 1. I need 2 mug in bed."
    assert thoughts[4] == "I need 1 mug in bed. I saw mug 1 at desk 1." and actions[4] == "go to desk 1"


def test_a_tool_seen_on_the_way_is_noticed() -> None:
    need = Need(object="mug", target="", property="rung", verb="ring", tool="gong", verbs=("ring",))
    player = Demonstrator(need, {"mug": ["desk", "bed"]})
    player.act("You see a desk 1, a bed 1.\n\nYour task is to: show mug to the gong.")
    thought, action = player.act("You arrive at desk 1. On the desk 1, you see a gong 1.")
    assert thought == "I see gong 1 here. I need mug with gong. I look in bed 1." and action == "go to bed 1"
    player.act("You arrive at bed 1. On the bed 1, you see a mug 1.")
    thought, action = player.act("You pick up the mug 1 from the bed 1.")
    assert thought == "I have mug 1. I need gong. I saw gong 1 at desk 1." and action == "go to desk 1"


def test_who_is_told_the_rule_goes_straight_to_the_tool_and_wins(made: list[tuple[Demo, Game]]) -> None:
    for demo, game in made:
        if not told(demo, game):
            continue
        assert game.rule and game.meta
        operations = [t.action for t in demo.turns if t.action.split()[0] == game.rule.verb]
        assert len(operations) == 1 and game.meta.tool in operations[0]
        last = demo.turns[-1]
        assert last.action.startswith("move " if game.rule.form == "with" else game.rule.verb)
        assert "Nothing happens" not in last.observation
        if game.rule.form == "with":
            taken = next(i for i, t in enumerate(demo.turns) if t.action.startswith("take "))
            then = [t.action for t in demo.turns[taken + 1 :]]
            assert then[0].startswith((f"go to {game.meta.tool} ", f"{game.rule.verb} ")), then


def test_who_is_not_told_tries_one_tool_or_verb_after_another(made: list[tuple[Demo, Game]]) -> None:
    tries = []
    for demo, game in made:
        if game.rule and not told(demo, game):
            verbs = {v for v, _ in VOCABULARY + GENERIC}
            attempts = [t.action for t in demo.turns if t.action.split()[0] in verbs]
            assert len(set(attempts)) == len(attempts), "no tool is tried twice"
            tries.append(len(attempts))
    assert max(tries) > 1


def test_demonstrations_end_won_or_are_long_explorations(made: list[tuple[Demo, Game]]) -> None:
    for demo, _ in made:
        assert 0 < len(demo.turns) <= MAX_TURNS
        moved = sum(t.observation.startswith("You move") for t in demo.turns)
        if demo.kind in (PICK, TWO):
            assert demo.turns[-1].observation.startswith("You move")
            assert moved == (2 if demo.kind == TWO else 1)


def test_the_agent_reads_every_demonstrated_turn_as_it_was_played(made: list[tuple[Demo, Game]]) -> None:
    agent = make_agent("react")
    for demo, _ in made:
        chat = example(demo, agent).messages
        replies = [m.content for m in chat if m.role == "assistant"]
        assert [agent.parse(r) for r in replies] == [Parsed(thought=x.thought, action=x.action) for x in demo.turns]
        assert chat[-1].role == "assistant"
        assert all(h in chat[1].content for h in demo.hints)


def test_rooms_of_evaluation_are_never_demonstrated(made: list[tuple[Demo, Game]]) -> None:
    assert not TRAIN & (FORBIDDEN | TEST | DEV)
    assert {g.plan for _, g in made} <= TRAIN
    counts = mixture(params(300, plain=0.4))
    for seed in range(3):
        assert {s.plan for s in plan_split("coldstart", counts, seed)} <= TRAIN
    for plan in (min(FORBIDDEN), min(TEST), min(DEV)):
        with pytest.raises(ContaminationError):
            plan_split("coldstart", {PICK: 1}, 0, plans=frozenset({plan}))


def test_the_same_seed_makes_the_same_demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path / "cache"))
    few = params(4)
    domain = AlfworldDomain()
    first, again, other = (domain.demonstrations(few, seed, tmp_path / str(i)) for i, seed in enumerate((5, 5, 6)))
    assert first == again
    assert {d.task_id for d in first} != {d.task_id for d in other}


@given(demos=st.integers(1, 1000), plain=st.floats(0, 1))
def test_the_mixture_adds_up(demos: int, plain: float) -> None:
    counts = mixture(params(demos, plain=plain))
    assert sum(counts.values()) == demos and min(counts.values()) >= 0
    assert set(counts) == {PICK, TWO, *HOUSE_KINDS}
    assert abs(counts[PICK] + counts[TWO] - plain * demos) <= 0.5


PLACED = [{"mug 1": "shelf 2", "pen 1": "desk 1"}, {"mug 2": "desk 1", "mug 1": "shelf 1"}, {"mug 1": "bed 1"}]
ROOMS = [["shelf 1", "shelf 2", "desk 1", "bed 1"], ["shelf 1", "desk 1", "sofa 1"], ["bed 1", "bed 2"]]


def test_the_search_order_is_by_frequency_per_receptacle_then_by_name() -> None:
    order = likelihood_order(PLACED * 50, ROOMS * 50)
    assert order["mug"] == ["shelf", "desk", "bed", "sofa"]  # 2 of 3 shelves, 1 of 2 desks, 1 of 3 beds
    assert order["pen"][0] == "desk"


def test_what_must_be_opened_is_searched_later_for_it_costs_two_steps() -> None:
    assert likelihood_order(PLACED * 50, ROOMS * 50, closed={"desk"})["mug"] == ["shelf", "bed", "desk", "sofa"]


def test_rare_objects_are_sought_where_objects_are_in_general() -> None:
    often = [{f"mug {i}": "shelf 1"} for i in range(90)]
    assert likelihood_order([*often, {"pen 1": "bed 1"}], ROOMS)["pen"][0] == "shelf"


@given(st.randoms(use_true_random=False))
def test_the_search_order_does_not_depend_on_the_order_of_games(rng: random.Random) -> None:
    placed, rooms = rng.sample(PLACED, len(PLACED)), [rng.sample(r, len(r)) for r in rng.sample(ROOMS, len(ROOMS))]
    assert likelihood_order(placed, rooms) == likelihood_order(PLACED, ROOMS)


def test_search_goes_by_likelihood_then_as_listed_and_leaves_the_target_for_the_end() -> None:
    listing = ["desk 10", "desk 2", "bed 1", "shelf 1", "sofa 1"]
    seen = f"You see a {', a '.join(listing)}.\n\nYour task is to: put a mug in bed."
    player = Demonstrator(Need(object="mug", target="bed"), {"mug": ["bed", "desk", "shelf"]})
    visits = []
    for _ in listing:
        _, action = player.act(seen)
        visits.append(action.removeprefix("go to "))
        seen = f"You arrive at {visits[-1]}. On the {visits[-1]}, you see nothing."
    assert visits == ["desk 10", "desk 2", "shelf 1", "sofa 1", "bed 1"]


def test_a_refused_place_is_left_for_the_end() -> None:
    start = "You see a desk 3, a desk 2, a desk 1.\n\nYour task is to: put a mug in bed."
    player = Demonstrator(Need(object="mug", target="bed"), {"mug": ["desk"]})
    assert player.act(start)[1] == "go to desk 3"
    thought, action = player.act("Nothing happens.")
    assert action == "go to desk 2" and thought.startswith("Nothing at desk 3. ")
    assert player.act("You arrive at desk 2. On the desk 2, you see nothing.")[1] == "go to desk 1"
    assert player.act("You arrive at desk 1. On the desk 1, you see nothing.")[1] == "go to desk 3"


@given(st.integers(0, 10_000))
def test_the_untold_try_each_receptacle_once_round_the_list_from_any_on(seed: int) -> None:
    need = Need(object="mug", target="bed", property="waxed", verb="wax", tool="bed")
    seen = "You see a bed 1, a desk 1, a sofa 2, a sofa 1.\n\nYour task is to: put a waxed mug in bed."
    player = Demonstrator(need, {"mug": ["sofa", "desk"]}, random.Random(seed))
    replies = {"go to sofa 2": "You arrive at sofa 2. On the sofa 2, you see a mug 1.", "take": "You take mug 1."}
    actions = []
    while sum(a.startswith("wax") for a in actions) < 4:
        actions.append(player.act(seen)[1])
        seen = replies.get(actions[-1], replies.get(actions[-1].split()[0], "Nothing happens."))
        if actions[-1].startswith("wax"):
            assert actions[-2] in (f"go to {actions[-1].split(' with ')[1]}", "take mug 1 from sofa 2")
    tried = [a.removeprefix("wax mug 1 with ") for a in actions if a.startswith("wax")]
    listing = ["bed 1", "desk 1", "sofa 2", "sofa 1"] * 2
    assert tried == listing[listing.index(tried[0]) :][:4]


def test_tries_start_anywhere() -> None:
    def first_try(seed: int) -> str:
        need = Need(object="mug", target="bed", property="waxed", verb="wax", tool="bed")
        player = Demonstrator(need, {"mug": ["desk"]}, random.Random(seed))
        player.act("You see a bed 1, a desk 1, a sofa 1.\n\nYour task is to: put a waxed mug in bed.")
        player.act("You arrive at desk 1. On the desk 1, you see a mug 1.")
        return player.act("You pick up the mug 1 from the desk 1.")[1]

    assert {first_try(s) for s in range(40)} == {"go to bed 1", "wax mug 1 with desk 1", "go to sofa 1"}


@given(st.randoms(use_true_random=False), st.sampled_from(VOCABULARY))
def test_every_wording_of_a_rule_spells_its_command(rng: random.Random, pair: tuple[str, str]) -> None:
    command = f"{pair[0]} {{object}} with {{desk}}"
    hint = rule_hint(rng, command, "desk")
    assert command in hint or command.capitalize() in hint
    assert set(re.findall(r"\{(\w+)\}", hint)) <= {"object", "desk", "target"}
    assert len(hint) <= 120, "as long as a mined hint may be"
