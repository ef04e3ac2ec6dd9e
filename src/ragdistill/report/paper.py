"""These results beside the paper's own (arXiv 2510.01375), where agent, model and protocol of evaluation are the same.

The paper gives one seed and no intervals: its Wilson intervals are computed here from its share and number of tasks.
Knows no HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import msgspec

from ragdistill import stats
from ragdistill.params import EnvParams


class Protocol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the paper evaluated on."""

    split: str
    tasks: int
    env: dict[str, Any]
    """What `env` says in the parameters, as far as it decides what is played."""


class Typical(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The mean episode of the 14B ReAct agent without hints."""

    steps: float
    tokens: float
    """Billed."""


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`paper.json`: success in percent, and on WebShop the score, of each environment/model/agent and policy."""

    source: str
    protocols: dict[str, Protocol]
    episodes: dict[str, Typical]
    models: dict[str, str]
    rows: dict[str, dict[str, str]]
    """Environment → agent → whose row of the paper is its, "" for nobody's; any other's is its own.

    The paper's WebShop "ReAct" has no thoughts: it is Act, and ReAct has no row there.
    """
    results: dict[str, dict[str, tuple[float, ...]]]


class Beside(msgspec.Struct, frozen=True):
    """One policy, ours and theirs; shares of 1."""

    policy: str
    ours: stats.Interval
    theirs: stats.Interval
    difference: stats.Interval
    """Ours − theirs, unpaired (Newcombe's interval from the two Wilson intervals)."""
    score: float | None
    their_score: float | None
    """Mean reward × 100, where the paper has it."""


class Comparison(msgspec.Struct, frozen=True):
    """All policies that both have."""

    source: str
    cell: str
    tasks: int
    rows: tuple[Beside, ...]


def published() -> Published:
    """The paper's numbers."""
    return msgspec.json.decode((files("ragdistill.report") / "paper.json").read_bytes(), type=Published)


def compare(metrics: Mapping[str, Any], env: EnvParams, model: str) -> Comparison | None:
    """The paper's cell beside `metrics`; None unless agent, model and all of its `Protocol` are the paper's.

    `env` without a null that stands for the environment's own value.
    """
    paper, name, agent = published(), metrics["env"], metrics["agent"]
    protocol, size = paper.protocols.get(name), paper.models.get(model.partition("@")[0])
    if protocol is None or size is None or (metrics["split"], metrics["tasks"]) != (protocol.split, protocol.tasks):
        return None
    if not protocol.env.items() <= msgspec.to_builtins(env).items():
        return None
    cell = f"{name}/{size}/{paper.rows.get(name, {}).get(agent, agent)}"
    theirs = paper.results.get(cell, {})
    ours = {name: row for name, row in metrics["policies"].items() if "success" in row and name in theirs}
    level = metrics["confidence"]
    rows = [_beside(name, ours[name], theirs[name], protocol.tasks, level) for name in theirs if name in ours]
    return Comparison(paper.source, cell, protocol.tasks, tuple(rows)) if rows else None


def _beside(name: str, row: Mapping[str, Any], theirs: tuple[float, ...], tasks: int, confidence: float) -> Beside:
    mine = stats.Interval(row["success"], row["success_lo"], row["success_hi"])
    won = round(theirs[0] / 100 * tasks)
    paper = stats.wilson(won, tasks, confidence)
    has_score = len(theirs) > 1
    return Beside(
        policy=name, ours=mine, theirs=paper, difference=newcombe(mine, paper),
        score=100 * row["score"] if has_score else None, their_score=theirs[1] if has_score else None,
    )  # fmt: skip


def newcombe(a: stats.Interval, b: stats.Interval) -> stats.Interval:
    """Difference of two independent shares from their Wilson intervals (Newcombe 1998, method 10)."""
    d = a.value - b.value
    down, up = math.hypot(a.value - a.lo, b.hi - b.value), math.hypot(a.hi - a.value, b.value - b.lo)
    return stats.Interval(d, d - down, d + up)
