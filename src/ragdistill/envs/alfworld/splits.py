"""Many proven games at once: rooms per split, task kinds balanced, worker processes, `Task` records.

`generate_split` decides in the parent which games to make (so the result does not depend on the number of processes)
and lets spawned workers build, prove and write them. Translations stay in `cache` for later play.
"""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ragdistill.envs.alfworld.engine import AlfworldEnv
from ragdistill.envs.alfworld.games import prove, write_game
from ragdistill.envs.alfworld.generator import Target, available_targets, generate_game
from ragdistill.envs.alfworld.goals import check_plan, group_of, split_plans
from ragdistill.envs.alfworld.rooms import load_room
from ragdistill.errors import ConfigError, DataError
from ragdistill.progress import track
from ragdistill.records import Task, seed_of


class Spec(msgspec.Struct, frozen=True):
    """One game to make."""

    split: str
    kind: str
    plan: int
    seed: int
    target: Target


def plan_split(split: str, counts: Mapping[str, int], seed: int, plans: frozenset[int] | None = None) -> list[Spec]:
    """Choose room and target of every game: rooms in turn, least used object first.

    `counts` is the number of games per kind. Raises `ContaminationError` for a room of another split and
    `ConfigError` when no room of the split can host a kind.
    """
    allowed = split_plans(split)
    for plan in plans or ():
        check_plan(plan, allowed)
    rooms = {p: load_room(p) for p in sorted(plans or allowed)}
    specs: list[Spec] = []
    for kind, count in counts.items():
        rng = random.Random(f"split {split} {kind} {seed}")
        options = {p: found for p, room in rooms.items() if (found := available_targets(kind, room))}
        if count and not options:
            raise ConfigError(f"No floor plan of the {split} split can host {kind}; set its count to 0.")
        order = rng.sample(sorted(options), len(options))
        used: Counter[str] = Counter()
        for i in range(count):
            plan = order[i % len(order)]
            target = min(options[plan], key=lambda t: (used[t.obj], used[f"{t.obj} {t.place}"], rng.random()))
            used.update((target.obj, f"{target.obj} {target.place}"))
            specs.append(Spec(split, kind, plan, seed_of("game", seed, split, kind, i), target))
    return specs


def generate_split(
    split: str,
    counts: Mapping[str, int],
    seed: int,
    out_dir: Path,
    cache: Path | None = None,
    processes: int = 2,
    plans: frozenset[int] | None = None,
) -> list[Task]:
    """Generate, prove and write a split's games under `out_dir`; tasks in a fixed order, `data` relative to it.

    Raises `ContaminationError` for foreign rooms and `DataError` when two games are the same.
    """
    specs, unit = plan_split(split, counts, seed, plans), f"{split} games"
    jobs = [(spec, out_dir, cache) for spec in specs]
    if processes <= 1:
        tasks = [_make(job) for job in track(jobs, unit, len(jobs))]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            tasks = list(track(pool.imap(_make, jobs, chunksize=4), unit, len(jobs)))
    if len({t.sha256 for t in tasks}) < len(tasks):
        raise DataError(f"Two games of the {split} split are the same; use another seed.")
    return tasks


_ENVS: dict[Path | None, AlfworldEnv] = {}
"""One engine per process and cache: its library is never unloaded, so it is kept for all games."""


def _make(job: tuple[Spec, Path, Path | None]) -> Task:
    spec, out_dir, cache = job
    env = _ENVS.setdefault(cache, AlfworldEnv(out_dir, cache))
    game = prove(generate_game(spec.kind, spec.plan, spec.seed, target=spec.target), env)
    sha = game.sha256
    name = f"{spec.split}/{spec.kind}-{game.target}-{game.destination or 'None'}-{spec.plan}/{sha[:12]}"
    path = write_game(game, out_dir / name)
    return Task(
        id=name, env="alfworld", split=spec.split, kind=spec.kind, group=group_of(spec.plan),
        data=path.relative_to(out_dir).as_posix(), sha256=sha,
    )  # fmt: skip
