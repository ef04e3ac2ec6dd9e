"""Official ALFWorld games as `Task` records, for a machine that has downloaded them.

`root` is the folder that holds `train`, `valid_seen`, `valid_unseen` (what `alfworld-download` calls `json_2.1.1`).
It only reads; it knows nothing of the engine.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ragdistill.envs.alfworld.goals import KINDS, group_of
from ragdistill.errors import ConfigError, DataError
from ragdistill.records import Task, read_json

SPLITS = ("train", "valid_seen", "valid_unseen")
VARIABLE = "ALFWORLD_DATA"
PREFIX = "official:"
"""`Task.data` of an official game starts so; the rest is relative to the official root, wherever a machine has it."""


def official_root() -> Path | None:
    """Data root named by `ALFWORLD_DATA` (it or its `json_2.1.1`), or None when there are no games."""
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    roots = (Path(value) / "json_2.1.1", Path(value))
    return next((r for r in roots if any((r / s).is_dir() for s in SPLITS)), None)


def official_tasks(root: Path, split: str) -> list[Task]:
    """All solvable games of an official split, sorted by id.

    Raises `ConfigError` for another split name and `DataError` when the split's folder is missing.
    """
    if split not in SPLITS:
        raise ConfigError(f"{split!r} is not an official split; use one of {', '.join(SPLITS)}.")
    if not (root / split).is_dir():
        raise DataError(f"The official split {split} is not under {VARIABLE}; `ragdistill data alfworld` fetches it.")
    tasks = [_task(root, split, path) for path in sorted((root / split).glob("*/*/game.tw-pddl"))]
    return [t for t in tasks if t is not None]


def _task(root: Path, split: str, path: Path) -> Task | None:
    """None for what the official loader skips: movable receptacles, sliced objects, unsolvable games."""
    name = path.parent.parent.name
    if "movable" in name or "Sliced" in name or not read_json(path).get("solvable", False):
        return None
    kind = str(read_json(path.parent / "traj_data.json")["task_type"])
    plan = name.rsplit("-", 1)[-1]
    if kind not in KINDS or not plan.isdigit():
        raise DataError(f"{name} is not an official game's folder name; download the games again.")
    return Task(
        id=f"{split}/{name}/{path.parent.name}", env="alfworld", split=split, kind=kind, group=group_of(int(plan)),
        data=PREFIX + path.relative_to(root).as_posix(), sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )  # fmt: skip
