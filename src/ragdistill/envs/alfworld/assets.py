"""The files inside the installed alfworld wheel: domain, grammar, layouts, affordances, goal library.

They are read without `import alfworld`, because that import creates a folder in the home directory and sets
`ALFWORLD_DATA`. This module knows nothing of games; it checks that the wheel is the one this project is written for.
"""

from __future__ import annotations

import json
import runpy
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ragdistill.errors import IdentityError

VERSIONS = {"alfworld": "0.4.2", "textworld": "1.7.0"}
"""Versions whose command grammar and feedback texts the agents and tests are written for."""
MOVE = 'template :: "move {o} to {r}";'
"""The grammar since alfworld 0.4.0; older games say "put X in/on Y" and would fail silently."""


@cache
def check_versions() -> dict[str, str]:
    """Installed versions; `IdentityError` when a package is missing or another version."""
    found: dict[str, str] = {}
    for name, wanted in VERSIONS.items():
        try:
            found[name] = distribution(name).version
        except PackageNotFoundError:
            raise IdentityError(f"{name} is not installed; install {name}=={wanted}.") from None
        if found[name] != wanted:
            raise IdentityError(f"{name} {found[name]} is installed, but this project needs {name}=={wanted}.")
    return found


def check_grammar(grammar: str, origin: str) -> None:
    """`IdentityError` when a game's grammar does not place objects with "move X to Y"."""
    if MOVE not in grammar:
        raise IdentityError(f"{origin} does not use `move X to Y`; take games made for alfworld>=0.4.0.")


def wheel_file(relative: str) -> Path:
    """A file of the alfworld wheel, e.g. `data/alfred.pddl`."""
    check_versions()
    return Path(str(distribution("alfworld").locate_file(f"alfworld/{relative}")))


@cache
def domain() -> str:
    """The wheel's PDDL domain."""
    return wheel_file("data/alfred.pddl").read_text(encoding="utf-8")


@cache
def grammar() -> str:
    """The wheel's text grammar, with `UNKNOWN GOAL` where the task sentence goes."""
    text = wheel_file("data/alfred.twl2").read_text(encoding="utf-8")
    check_grammar(text, "the installed alfworld grammar")
    return text


@cache
def constants() -> dict[str, Any]:
    """Names defined by alfworld's `gen/constants.py` (affordances, containment, openable types)."""
    return runpy.run_path(str(wheel_file("gen/constants.py")))


@cache
def goal_library() -> dict[str, dict[str, Any]]:
    """alfworld's goal library: PDDL goal and sentence templates per task type."""
    return runpy.run_path(str(wheel_file("gen/goal_library.py")))["gdict"]


def layout_file(plan: int, what: str) -> Path:
    """A layout file of a floor plan; `what` is `objects.json`, `openable.json` or `layout.npy`."""
    return wheel_file(f"gen/layouts/FloorPlan{plan}-{what}")


def layout_json(plan: int, what: str) -> Any:
    """Parsed `objects.json` (list of types) or `openable.json` (receptacle id → [x, z, rotation, horizon])."""
    return json.loads(layout_file(plan, what).read_text(encoding="utf-8"))
