"""ALFWorld as a `Domain`: its tasks, its environments and its cold-start demonstrations. Knows no model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ragdistill.envs import Defaults, Demo, Env, Turn
from ragdistill.envs.alfworld.demonstrator import Demonstrator, Need, SearchOrder, likelihood_order
from ragdistill.envs.alfworld.engine import AlfworldEnv
from ragdistill.envs.alfworld.examples import example_type, library
from ragdistill.envs.alfworld.games import Game, read_game
from ragdistill.envs.alfworld.goals import CLEAN, COOL, HEAT, HOUSE_AT, HOUSE_WITH, KINDS, LOOK, PICK, TWO
from ragdistill.envs.alfworld.houserules import VOCABULARY, wrong_verbs
from ragdistill.envs.alfworld.official import VARIABLE, official_root, official_tasks
from ragdistill.envs.alfworld.rooms import OPENABLE
from ragdistill.envs.alfworld.splits import generate_split
from ragdistill.envs.paraphrase import generic_hint, rule_hint, warning_hint
from ragdistill.errors import ConfigError, DataError
from ragdistill.journal import cache_dir
from ragdistill.params import ColdstartParams
from ragdistill.progress import track
from ragdistill.records import Task, seed_of

MAX_TURNS = 50
"""A demonstration that has not found its tool by then ends there: that, too, is what exploring looks like."""
MAX_UNFINISHED = 0.15
"""Share of such demonstrations above which something is wrong with the demonstrator rather than with its luck."""
MAX_VERBS = 8
"""Verbs tried on a tool, the right one included, where the rule is not told."""


class AlfworldDomain:
    """See `ragdistill.envs.Domain`."""

    name = "alfworld"
    evaluation_splits: tuple[str, ...] = ("test", "dev", "valid_seen", "valid_unseen")
    defaults = Defaults(kinds=KINDS, primary=(LOOK, CLEAN, HEAT, COOL), buckets=len(KINDS), group="room")
    """A turn has about 25 tokens; the primary types are never demonstrated."""

    def fingerprint(self) -> str:
        return AlfworldEnv(Path()).fingerprint()

    def env_factory(self, cache: Path, admissible: bool) -> Callable[[], Env]:
        return partial(open_env, cache, admissible)

    def tasks(self, split: str, count: int, seed: int, out: Path) -> list[Task]:
        if split in ("train", "dev", "test"):
            tasks = generate_split(split, spread(count, KINDS), seed, out, cache_dir("env"))
            return [_under(t, str(out)) for t in tasks]
        root = official_root()
        if root is None:
            raise ConfigError(f"tasks ask for official games ({split}); set {VARIABLE} or choose generated ones.")
        tasks = official_tasks(root, split.removeprefix("official_"))
        if split == "official_train":
            return sample(tasks, count, seed)
        return tasks

    def examples(self) -> Mapping[str, Sequence[Demo]]:
        """See `ragdistill.envs.HasExamples`."""
        return library()

    def example_type(self, first_observation: str) -> str:
        return example_type(first_observation)

    def demonstrations(self, params: ColdstartParams, seed: int, out: Path) -> list[Demo]:
        counts = mixture(params)
        tasks = generate_split("coldstart", counts, seed, out, cache_dir("env"))
        games = [read_game(out / t.data) for t in tasks]
        order = search_order(games)
        env = AlfworldEnv(out, cache_dir("env"))
        rng = random.Random(seed_of("demonstrations", seed))
        pairs = track(zip(tasks, games, strict=True), "demonstrations", len(tasks))
        demos = [demonstrate(t, g, env, order, params, rng) for t, g in pairs]
        unfinished = [d for d in demos if not d.won]
        if len(unfinished) > 1 + MAX_UNFINISHED * len(demos):
            raise DataError(
                f"The demonstrator did not finish {len(unfinished)} of {len(demos)} games, {unfinished[0].task_id} "
                "among them; use another seed."
            )
        rng.shuffle(demos)
        return demos


def open_env(cache: Path, admissible: bool) -> AlfworldEnv:
    """Made inside a worker process. `Task.data` is relative to the working directory, or absolute if official."""
    return AlfworldEnv(Path(), cache, admissible)


def spread(count: int, kinds: tuple[str, ...]) -> dict[str, int]:
    """`count` over `kinds` as evenly as it goes."""
    return {kind: count // len(kinds) + (i < count % len(kinds)) for i, kind in enumerate(kinds)}


def sample(tasks: list[Task], count: int, seed: int) -> list[Task]:
    """`count` tasks, balanced over kinds, drawn by `seed`."""
    drawn: list[Task] = []
    for kind, n in spread(count, KINDS).items():
        pool = [t for t in tasks if t.kind == kind]
        drawn += random.Random(seed_of("sample", seed, kind)).sample(pool, min(n, len(pool)))
    return sorted(drawn, key=lambda t: t.id)


def search_order(games: Sequence[Game]) -> SearchOrder:
    """Where to look for each object type; all fixtures share one order."""
    metas = [g.meta for g in games if g.meta]
    rooms = [m.receptacles for m in metas]
    closed = {t.lower() for t in OPENABLE}
    order = likelihood_order([m.placement for m in metas], rooms, closed)
    stands = [(m.tool, m.placement[t]) for m in metas for t in m.tools if t in m.placement]
    shared = likelihood_order([{"fixture 1": place} for _, place in stands], rooms, closed)
    return order | {tool: shared["fixture"] for tool, _ in stands}


def mixture(params: ColdstartParams) -> dict[str, int]:
    """Games per kind: plain pick and two-object tasks, house rules of both forms."""
    plain = round(params.demos * params.plain)
    rules = params.demos - plain
    return {PICK: plain - plain // 2, TWO: plain // 2, HOUSE_WITH: rules - rules // 3, HOUSE_AT: rules // 3}


def demonstrate(
    task: Task, game: Game, env: AlfworldEnv, order: SearchOrder, params: ColdstartParams, rng: random.Random
) -> Demo:
    """Play one game to its end, or to `MAX_TURNS`."""
    told = game.rule is not None and rng.random() < params.hinted / max(1.0 - params.plain, 1e-9)
    hints = draw_hints(game, told, rng, params.irrelevant)
    first = env.reset(task)
    player = Demonstrator(need_of(game, first.goal, told, rng), order, rng)
    turns: list[Turn] = []
    seen = first
    while not seen.done and len(turns) < MAX_TURNS:
        thought, action = player.act(seen.text)
        state = {"goal": first.goal.rstrip("."), **player.state}
        seen = env.step(action)
        turns.append(Turn(thought=thought, action=action, observation=seen.text, state=state))
    return Demo(
        task_id=task.id, kind=task.kind, hints=hints, first_observation=first.text, turns=tuple(turns), won=seen.done
    )


def need_of(game: Game, goal: str, told: bool, rng: random.Random) -> Need:
    """What the goal asks for, with the goal's own word for the property ("polished" or "polish")."""
    assert game.meta is not None  # noqa: S101 - read_game returns proven games
    rule, meta = game.rule, game.meta
    word = ""
    if rule is not None:
        word = rule.adjective if rule.adjective in goal.lower().split() else rule.verb
    verbs: tuple[str, ...] = ()
    if rule is not None and rule.form == "at":
        verbs = (*wrong_verbs(rng, rule.verb, rng.randrange(MAX_VERBS)), rule.verb)
    return Need(
        object=meta.target, target=meta.destination, count=2 if game.kind == TWO else 1, property=word,
        verb=rule.verb if rule else "", tool=meta.tool, told=told, verbs=verbs,
    )  # fmt: skip


def draw_hints(game: Game, told: bool, rng: random.Random, irrelevant: float) -> tuple[str, ...]:
    """The rule in some wording if `told`, and at times hints that change nothing, in random order."""
    assert game.meta is not None  # noqa: S101
    hints: list[str] = []
    if told and game.rule is not None:
        hints.append(rule_hint(rng, game.rule.command("{object}", "{" + game.meta.tool + "}"), game.meta.tool))
    if rng.random() < irrelevant:
        hints += [_irrelevant(game, told, rng) for _ in range(rng.randint(1, 3 - len(hints)))]
    rng.shuffle(hints)
    return tuple(dict.fromkeys(hints))


def _irrelevant(game: Game, told: bool, rng: random.Random) -> str:
    """A hint about searching, a warning against a wrong tool, or the rule of another operation.

    Beside a true rule whose verb the goal does not spell ("tiny": shrink), another rule would be a riddle, so none is
    shown there.
    """
    assert game.meta is not None  # noqa: S101
    places = sorted({r.split()[0] for r in game.meta.receptacles})
    riddle = told and game.rule is not None and game.rule.verb[:4] != game.rule.adjective[:4]
    if riddle or rng.random() < 0.5:
        wrong = [p for p in places if p != game.meta.tool]
        if game.rule is not None and game.rule.form == "with" and wrong and rng.random() < 0.5:
            return warning_hint(rng, game.rule.command("{object}", "{" + rng.choice(wrong) + "}"))
        return generic_hint(rng, places)
    verb = rng.choice([v for v, a in VOCABULARY if game.rule is None or v != game.rule.verb])
    tool = rng.choice(places)
    return rule_hint(rng, f"{verb} {{object}} with {{{tool}}}", tool)


def _under(task: Task, folder: str) -> Task:
    import msgspec

    return msgspec.structs.replace(task, data=f"{folder}/{task.data}")
