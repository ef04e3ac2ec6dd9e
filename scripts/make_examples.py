"""Write the example episodes that prompts can show (`agent.examples`), played in the real environments.

    PYTHONPATH=src python scripts/make_examples.py [alfworld] [webshop]

Deterministic. ALFWorld: games generated in training rooms, played by the cold start's searcher, told the rule; the
thoughts are this script's. WebShop: goals of embedded products of the cold start's split, bought by a shopper who knows
the right product and says why it fits.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import msgspec

from ragdistill.envs import Demo, Turn
from ragdistill.envs.alfworld.demonstrator import Demonstrator, Need, SearchOrder
from ragdistill.envs.alfworld.engine import AlfworldEnv
from ragdistill.envs.alfworld.examples import Played
from ragdistill.envs.alfworld.games import TOOLS, prove
from ragdistill.envs.alfworld.generator import available_targets, generate_game
from ragdistill.envs.alfworld.goals import CLEAN, COOL, HEAT, KINDS, LOOK, TRAIN, TWO
from ragdistill.envs.alfworld.rooms import OPENABLE, Room, load_room, priors
from ragdistill.envs.webshop.catalogue import Catalogue, GoalRow
from ragdistill.envs.webshop.demonstrator import MAX_QUERY, need_of
from ragdistill.envs.webshop.examples import SHOPPING
from ragdistill.envs.webshop.goals import NO_BOUND, Source, gold_options
from ragdistill.envs.webshop.pages import BUY
from ragdistill.envs.webshop.shop import Visit, selection
from ragdistill.envs.webshop.sources import VARIABLE, catalogue_folder
from ragdistill.envs.webshop.splits import split_of
from ragdistill.files import write_atomic

ENVS = Path(__file__).resolve().parents[1] / "src" / "ragdistill" / "envs"
EACH = 2
"""Examples of a task type: what the ReAct prompts show."""
RECEPTACLES = 24
"""Of a room at most; a kitchen with 60 takes 300 tokens to list."""
TURNS = {LOOK: (6, 10), TWO: (9, 14)}
"""Fewest and most turns; the others (7, 11)."""
MADE = {CLEAN: "clean", HEAT: "hot", COOL: "cool"}
"""What an operation makes of an object."""


def search_order(room: Room, objects: tuple[str, ...]) -> SearchOrder:
    """Receptacle types by the chance of one of them, in official training games, to hold an object."""
    number = Counter(r.type for r in room.receptacles)
    order: dict[str, list[str]] = {}
    for obj in objects:
        found = priors()["placement"].get(obj, {})
        worth = {t: found.get(t, 0) / n / (2 if t in OPENABLE else 1) for t, n in number.items()}
        order[obj.lower()] = [t.lower() for t in sorted(worth, key=lambda t: (-worth[t], t))]
    return order


def need(kind: str, obj: str, place: str) -> Need:
    """What the searcher is after; clean, heat, cool and the lamp are rules it is told."""
    if kind == LOOK:
        lamp = place.lower()
        return Need(object=obj, target="", property="lit", verb="use", tool=lamp, told=True, verbs=("use",))
    if kind in TOOLS:
        verb, tool = TOOLS[kind][0], TOOLS[kind][1].lower()
        return Need(object=obj, target=place.lower(), property=MADE[kind], verb=verb, tool=tool, told=True)
    return Need(object=obj, target=place.lower(), count=2 if kind == TWO else 1)


def a(noun: str) -> str:
    """`noun` with its article."""
    return f"{'an' if noun[:1] in tuple('aeiou') else 'a'} {noun}"


def plan_of(kind: str, n: Need, likely: list[str], first: str) -> str:
    """The first thought: all steps to come, and where to begin."""
    steps = {
        LOOK: f"find {a(n.object)} and take it, then find {a(n.tool)} and use it while I hold the {n.object}",
        TWO: f"put two {n.object} in {n.target}; I carry one at a time, so I find and move one after the other",
    }
    operate = f", {n.verb} it with {a(n.tool)}" if kind in TOOLS else ""
    todo = steps.get(kind, f"find {a(n.object)}, take it{operate} and move it to {a(n.target)}")
    places = " or ".join(map(a, likely))
    return f"I have to {todo}. {a(n.object).capitalize()} is likely to be at {places}. I start with {first}."


def going(kind: str, p: Demonstrator, before: str, place: str) -> str:
    """Why the searcher goes to `place`; `before` is the action before."""
    n, wanted = p.need, p.need.tool if p.holding else p.need.object
    if p.holding and kind in TOOLS and not p.has_property:
        return f"I have {p.holding}. It has to be {n.property}, so I go to {place} to {n.verb} it."
    if p.holding and kind != LOOK:
        return f"I have {p.holding}{f', and it is {n.property}' if n.property else ''}. I bring it to {place}."
    start = f"I have {p.holding}. Now I need {a(n.tool)}. " if before.startswith("take ") else ""
    start = f"One {n.object} is in place, one more to go. " if before.startswith("move ") else start
    seen = p.tools if p.holding else p.known
    if seen:
        return f"{start}I saw {next(iter(seen))} at {place}, so I go there."
    return f"{start}Next I look at {place}." if start else f"There is no {wanted} here. Next I look at {place}."


def thought(kind: str, p: Demonstrator, before: str, action: str) -> str:
    """Why the searcher plays `action`, told before it is played."""
    verb, _, rest = action.partition(" ")
    if not p.visited and not p.closed:
        likely = [t for t in p.order[p.need.object] if t != p.need.target]
        return plan_of(kind, p.need, likely[:2], rest.removeprefix("to "))
    if verb == "go":
        return going(kind, p, before, rest.removeprefix("to "))
    if verb == "open":
        return f"The {rest} is closed, so I open it."
    if verb == "take":
        return f"Here is {rest.split(' from ')[0]}. I take it."
    if verb == "use":
        return f"Here is {rest}, and I hold {p.holding}. I use the {p.need.tool} to look at it."
    if verb == "move":
        return f"I am at {p.at} with {p.holding}. I move it there."
    return f"I am at {p.at} with {p.holding}. I {verb} it."


def play_game(kind: str, plan: int, seed: int, env: AlfworldEnv) -> Played | None:
    """An episode in the game of these arguments; None unless it is won, without a refused action, after a miss."""
    game = generate_game(kind, plan, seed)
    prove(game, env)
    first = env.load(game.data)
    order = search_order(load_room(plan), (game.target, *([game.destination] if kind == LOOK else [])))
    p = Demonstrator(need(kind, game.target.lower(), game.destination), order)
    turns: list[Turn] = []
    seen, least, most = first, *TURNS.get(kind, (7, 11))
    while not seen.done and len(turns) < most:
        before = p.last
        _, action = p.act(seen.text)
        said, state = thought(kind, p, before, action), {"goal": first.goal.rstrip("."), **p.state}
        seen = env.step(action)
        turns.append(Turn(thought=said, action=action, observation=seen.text, state=state))
        if not seen.valid:
            return None
    missed = any("there is no" in t.thought.lower() for t in turns)
    if not seen.done or len(turns) < least or not missed:
        return None
    name = f"examples/{kind}-{game.target}-{game.destination}-{plan}-{seed}"
    demo = Demo(task_id=name, kind=kind, hints=(), first_observation=first.text, turns=tuple(turns), won=True)
    return Played(plan=plan, seed=seed, object=game.target, place=game.destination, demo=demo)


def alfworld() -> list[Played]:
    """`EACH` episodes of every task type: no room, object or, in a type, wording of the goal and target twice."""
    env, rng, found = AlfworldEnv(Path()), random.Random("examples"), list[Played]()
    rooms = [p for p in sorted(TRAIN) if len(load_room(p).receptacles) <= RECEPTACLES]
    for kind in KINDS:
        own: list[Played] = []
        for seed in count():
            plan = rng.choice([r for r in rooms if available_targets(kind, load_room(r))])
            game = generate_game(kind, plan, seed)
            if plan in {p.plan for p in found} or game.target in {p.object for p in found}:
                continue
            one = play_game(kind, plan, seed, env)
            if one and not any(wording(one.demo) == wording(o.demo) or same_place(kind, one, o) for o in own):
                own.append(one)
                found.append(one)
                print(one.demo.task_id, len(one.demo.turns), flush=True)
            if len(own) == EACH:
                break
    return found


def same_place(kind: str, one: Played, other: Played) -> bool:
    """Whether two games of a type end at the same kind of place; lamps are no places."""
    return kind != LOOK and one.place == other.place


def wording(demo: Demo) -> str:
    """The first two words of the goal, which tell its two templates apart."""
    return " ".join(demo.turns[0].state["goal"].split()[:2])


def shop(catalogue: Catalogue, row: GoalRow, shown: str) -> Demo | None:
    """The purchase that a goal asks for, on pages of variant `shown`; None unless it is short and fully rewarded."""
    goal = catalogue.goal(row.source, row.number)
    product, options = catalogue.product(goal.asin), gold_options(goal, catalogue.product(goal.asin))
    bound = f"{goal.price_upper:.2f} dollars"
    visit = Visit(catalogue, goal, show_chosen=shown.startswith("chosen"), show_attributes=shown.endswith("attributes"))
    wanted = need_of(goal.instruction)
    plan = [
        (f"I need {wanted}, for less than {bound}. I search for it.", f"search[{wanted[:MAX_QUERY]}]"),
        (f"{product.asin} is {product.title}, for {product.price_tag}: what I need, and below {bound}. I open it.",
         f"click[{product.asin}]"),
        *((f"There is a choice of {name}. I need {value}.", f"click[{value}]") for name, value in options.items()),
        (f"{' and '.join(options.values())} {'are' if len(options) > 1 else 'is'} chosen and the price fits. I buy it.",
         f"click[{BUY}]"),
    ]  # fmt: skip
    first, turns = visit.page.text, list[Turn]()
    for said, action in plan:
        state = {"goal": goal.instruction, "current selection": selection(visit)}
        if not visit.act(action):
            return None
        turns.append(Turn(thought=said, action=action, observation=visit.page.text, state=state))
    if visit.earned is None or visit.earned.total < 1.0:
        return None
    return Demo(
        task_id=f"{row.source}/{row.number}", kind=SHOPPING, hints=(), first_observation=first, turns=tuple(turns),
        won=True,
    )  # fmt: skip


def candidates(catalogue: Catalogue, source: Source, options: int) -> Iterator[GoalRow]:
    """Goals with so many options and a price bound, of products that the cold start's split has."""
    for row in catalogue.goal_rows(source):
        goal = catalogue.goal(source, row.number)
        own, fits = split_of(row.family) == "coldstart", len(goal.options) == options
        if own and fits and row.feasible and goal.price_upper < NO_BOUND:
            yield row


def webshop() -> dict[str, list[Demo]]:
    """One goal in a person's words with one option, one synthetic goal with two, of different categories."""
    os.environ.pop(VARIABLE, None)
    with tempfile.TemporaryDirectory() as cache:
        catalogue = Catalogue(catalogue_folder(Path(cache), None))
        rows: list[GoalRow] = []
        wanted: tuple[tuple[Source, int], ...] = (("human", 1), ("synthetic", 2))
        for source, options in wanted:
            free = (r for r in candidates(catalogue, source, options) if r.category not in {o.category for o in rows})
            rows.append(next(r for r in free if shop(catalogue, r, "original")))
        variants = [f"{o}{a}" for o in ("original", "chosen") for a in ("", "+attributes")]
        found = {v: [demo for r in rows if (demo := shop(catalogue, r, v))] for v in variants}
        catalogue.close()
    return found


if __name__ == "__main__":
    for which in sys.argv[1:] or ("alfworld", "webshop"):
        made = {"alfworld": alfworld, "webshop": webshop}[which]()
        text = msgspec.json.format(msgspec.json.encode(made), indent=1)  # a state's fields keep their order
        write_atomic(ENVS / which / "examples.json", text + b"\n")
