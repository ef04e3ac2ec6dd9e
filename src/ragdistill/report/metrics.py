"""Evaluation episodes → one nested dict of numbers, the file behind `dvc metrics`, the tables and the page.

Success is a share (0–1). Tasks are the observations: training seeds of a policy are averaged per task. Episodes that
ended in `infra_error` are excluded and counted apart. Knows no file and draws nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ragdistill import stats
from ragdistill.errors import DataError, EmptyResultError
from ragdistill.params import ReportParams
from ragdistill.records import EvalEpisode, StopReason
from ragdistill.stats import Floats, Interval

ORDER = (
    "raw", "base", "rag_constant", "rag_random", "rag", "sft", "sft_retry", "distilled_random", "distilled",
)  # fmt: skip
"""Reading order of policies; unknown ones follow by name."""

FIELDS: Mapping[str, Callable[[EvalEpisode], float]] = {
    "success": lambda e: float(e.success),
    "score": lambda e: e.score,
    "steps": lambda e: float(e.steps),
    "invalid": lambda e: float(e.invalid),
    "tokens_billed": lambda e: float(e.tokens_billed),
    "tokens_computed": lambda e: float(e.tokens_computed),
    "tokens_completion": lambda e: float(e.tokens_completion),
    "seconds": lambda e: e.seconds,
}
_WITH_INTERVAL = ("score", "steps", "tokens_billed", "tokens_computed", "seconds")


@dataclass(frozen=True)
class Grid:
    """All episodes of one policy: for each field an array tasks × seeds, NaN where none finished."""

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    groups: tuple[str, ...]
    """Room of each task."""
    cells: Mapping[str, Floats]
    infra: int

    def rows(self, tasks: Iterable[str], field: str) -> Floats:
        """The rows of `tasks`, in that order."""
        place = {t: i for i, t in enumerate(self.tasks)}
        return self.cells[field][[place[t] for t in tasks]]


def compute_metrics(
    episodes: Sequence[EvalEpisode],
    *,
    env: str,
    agent: str,
    split: str,
    label: str,
    primary: Sequence[str],
    params: ReportParams,
    infeasible: Collection[str] = (),
) -> dict[str, Any]:
    """All numbers of one evaluation, rounded to four decimals, without NaN (a number that does not exist is left out).

    Args:
        episodes: of all policies and seeds.
        env, agent, split, label: named in the result, so that a number never stands without them.
        primary: task kinds of the primary estimate; empty means all.
        params: number of resamples and confidence level.
        infeasible: ids of tasks that cannot earn the full reward; where some were played, `feasible` holds the
            numbers without them, of all tasks and of the primary ones.

    Raises:
        EmptyResultError: no episode, or none of a primary kind.
        DataError: one policy and seed played a task twice.
    """
    chosen = [e for e in episodes if not primary or e.kind in primary]
    if not chosen:
        raise EmptyResultError(
            f"No evaluated episode of the kinds {', '.join(primary) or 'any'}: check evaluate.primary and tasks.test."
        )
    feasible, first = ([e for e in part if e.task_id not in infeasible] for part in (episodes, chosen))
    parts, whole = _parts(episodes), len(feasible) in (0, len(episodes))
    return {
        "env": env,
        "agent": agent,
        "split": split,
        "label": label,
        "seeds": sorted({e.seed for e in episodes}),
        "confidence": params.confidence,
        **_estimate(episodes, params),
        "primary": {"kinds": list(primary), **_estimate(chosen, params)},
        **({} if whole else {"feasible": {**_estimate(feasible, params), "primary": _estimate(first, params)}}),
        **({"parts": parts} if parts else {}),
        "by_kind": _by(episodes, lambda e: e.kind, params.confidence),
        "by_room": _by(episodes, lambda e: e.group, params.confidence),
    }


def has_scores(metrics: Mapping[str, Any]) -> bool:
    """Whether some policy's score (mean reward) is not its success: then the score is worth showing."""
    return any(row.get("score") != row.get("success") for row in metrics["policies"].values())


def order(names: Iterable[str]) -> list[str]:
    """Policies in reading order."""
    return sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))


def order_pairs(names: Iterable[str]) -> list[str]:
    """Differences (`a-b`) in reading order: the student's first, each against its rivals in the order of policies."""

    def key(pair: str) -> tuple[int, str, int, str]:
        a, b = pair.split("-", 1)
        place = {name: i for i, name in enumerate(ORDER)}
        return -place.get(a, -1), a, place.get(b, len(ORDER)), b

    return sorted(names, key=key)


def build_grids(episodes: Sequence[EvalEpisode]) -> dict[str, Grid]:
    """One grid a policy, in reading order."""
    by_policy: dict[str, list[EvalEpisode]] = defaultdict(list)
    for e in episodes:
        by_policy[e.policy].append(e)
    return {name: _grid(by_policy[name]) for name in order(by_policy)}


def compare(
    a: Sequence[EvalEpisode], b: Sequence[EvalEpisode], primary: Sequence[str], params: ReportParams
) -> stats.PairedTest:
    """Success of `a`'s policy minus `b`'s on their common primary tasks; what a promotion is decided on.

    Raises:
        EmptyResultError: they finished no task in common.
    """
    left, right = (_grid([e for e in side if not primary or e.kind in primary]) for side in (a, b))
    tasks, _ = _common(left, right)
    if not tasks:
        raise EmptyResultError("The two policies finished no primary task in common; evaluate both on the same split.")
    return stats.paired_test(
        left.rows(tasks, "success"), right.rows(tasks, "success"), params.bootstrap, params.confidence
    )


def _grid(episodes: Sequence[EvalEpisode]) -> Grid:
    tasks, seeds = sorted({e.task_id for e in episodes}), sorted({e.seed for e in episodes})
    rows, columns = {t: i for i, t in enumerate(tasks)}, {s: i for i, s in enumerate(seeds)}
    groups = {e.task_id: e.group for e in episodes}
    cells = {field: np.full((len(tasks), len(seeds)), np.nan) for field in FIELDS}
    seen: set[tuple[int, str]] = set()
    for e in episodes:
        if (e.seed, e.task_id) in seen:
            raise DataError(f"{e.policy}-{e.seed} played {e.task_id} twice; delete its file and evaluate again.")
        seen.add((e.seed, e.task_id))
        if e.stop is not StopReason.INFRA_ERROR:
            for field, read in FIELDS.items():
                cells[field][rows[e.task_id], columns[e.seed]] = read(e)
    infra = sum(e.stop is StopReason.INFRA_ERROR for e in episodes)
    return Grid(tuple(tasks), tuple(seeds), tuple(groups[t] for t in tasks), cells, infra)


def _estimate(episodes: Sequence[EvalEpisode], params: ReportParams) -> dict[str, Any]:
    """One set of tasks: their number, policies, paired differences and token ratios."""
    grids = build_grids(episodes)
    pairs = _pairs(list(grids))
    paired = {f"{a}-{b}": _paired(grids[a], grids[b], params) for a, b in pairs}
    tokens = {f"{a}_over_{b}": _ratios(grids[a], grids[b], params) for a, b in pairs}
    return {
        "tasks": len({e.task_id for e in episodes}),
        "policies": {name: _policy(grid, params) for name, grid in grids.items()},
        "paired": {k: v for k, v in paired.items() if v},
        "tokens": {k: v for k, v in tokens.items() if v},
    }


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which policies are compared: the student with all, hints with their controls, the rest with where they start."""
    wanted = [("distilled", n) for n in names if n not in ("distilled", "raw")]
    wanted += [("rag", n) for n in names if n == "base" or n.startswith("rag_")]
    wanted += [(n, "base") for n in names if n.startswith(("sft", "rag_", "distilled_"))]
    wanted += [("base", "raw")]
    return [(a, b) for a, b in wanted if a in names and b in names]


def _policy(grid: Grid, params: ReportParams) -> dict[str, Any]:
    played = np.asarray(np.isfinite(grid.cells["success"]).any(axis=1))
    n = int(played.sum())
    out: dict[str, Any] = {"n": n, "episodes": int(np.isfinite(grid.cells["success"]).sum()), "infra": grid.infra}
    if n == 0:
        return out
    groups = [g for g, p in zip(grid.groups, played, strict=True) if p]
    success = grid.cells["success"][played]
    out |= _flat("success", stats.wilson(float(np.nanmean(success, axis=1).sum()), n, params.confidence))
    if len(set(groups)) > 1:
        room = stats.mean_interval(success, params.bootstrap, params.confidence, groups)
        out |= {"success_room_lo": _r(room.lo), "success_room_hi": _r(room.hi)}
    for field in FIELDS:
        if field in _WITH_INTERVAL:
            found = stats.mean_interval(grid.cells[field][played], params.bootstrap, params.confidence)
            out |= _flat(field, found)
        elif field != "success":
            out[field] = _r(stats.mean(grid.cells[field][played]))
    times = (grid.cells[field][played].ravel() for field in ("seconds", "steps"))
    pace = [seconds / steps for seconds, steps in zip(*times, strict=True) if steps > 0]
    out |= {f"step_seconds_p{q}": _r(float(np.percentile(pace, q))) for q in (50, 95) if pace}
    columns = {str(seed): success[:, i] for i, seed in enumerate(grid.seeds)}
    out["by_seed"] = {seed: _r(float(np.nanmean(c))) for seed, c in columns.items() if np.isfinite(c).any()}
    return out


def _common(a: Grid, b: Grid) -> tuple[list[str], int]:
    """Tasks on which every episode of both policies finished, and how many others are dropped."""
    both = [t for t in a.tasks if t in set(b.tasks)]
    if not both:
        return [], len({*a.tasks, *b.tasks})
    kept = stats.complete(a.rows(both, "success"), b.rows(both, "success"))
    tasks = [t for t, k in zip(both, kept, strict=True) if k]
    return tasks, len({*a.tasks, *b.tasks}) - len(tasks)


def _paired(a: Grid, b: Grid, params: ReportParams) -> dict[str, Any]:
    tasks, dropped = _common(a, b)
    if not tasks:
        return {}
    x, y = a.rows(tasks, "success"), b.rows(tasks, "success")
    test = stats.paired_test(x, y, params.bootstrap, params.confidence)
    out: dict[str, Any] = {"diff": _r(test.diff.value), "lo": _r(test.diff.lo), "hi": _r(test.diff.hi)}
    out |= {"p": _r(test.p), "n": test.n, "wins": test.wins, "losses": test.losses, "dropped": dropped}
    groups = [dict(zip(a.tasks, a.groups, strict=True))[t] for t in tasks]
    if len(set(groups)) > 1:
        room = stats.paired_interval(x, y, params.bootstrap, params.confidence, groups)
        out |= {"room_lo": _r(room.lo), "room_hi": _r(room.hi)}
    for field in ("score", "steps"):
        found = stats.paired_interval(a.rows(tasks, field), b.rows(tasks, field), params.bootstrap, params.confidence)
        out |= _flat(field, found)
    return out


def _ratios(a: Grid, b: Grid, params: ReportParams) -> dict[str, float]:
    """Tokens of `a` per token of `b` on the same tasks, as billed and as computed."""
    tasks, _ = _common(a, b)
    out: dict[str, float] = {}
    for name in ("billed", "computed") if tasks else ():
        x, y = a.rows(tasks, f"tokens_{name}"), b.rows(tasks, f"tokens_{name}")
        ratio = stats.ratio_interval(x, y, params.bootstrap, params.confidence)
        if ratio is not None:
            out |= _flat(name, ratio)
    return out


def _parts(episodes: Sequence[EvalEpisode]) -> dict[str, Any]:
    """Policy → mean of each part of the reward over the episodes that have it, and `n`, those that have any."""
    found: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for e in episodes:
        if isinstance(e.parts, dict):
            found[e.policy].append(e.parts)
    return {name: {"n": len(found[name]), **_means(found[name])} for name in order(found)}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    values = {
        name: [row[name] for row in rows if name in row] for name in dict.fromkeys(n for row in rows for n in row)
    }
    return {name: _r(sum(v) / len(v)) for name, v in values.items()}


def _by(episodes: Sequence[EvalEpisode], part: Callable[[EvalEpisode], str], confidence: float) -> dict[str, Any]:
    """Part (task kind, room) → policy → success with Wilson's interval."""
    parts: dict[str, list[EvalEpisode]] = defaultdict(list)
    for e in episodes:
        parts[part(e)].append(e)
    return {name: _shares(parts[name], confidence) for name in sorted(parts)}


def _shares(episodes: Sequence[EvalEpisode], confidence: float) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, grid in build_grids(episodes).items():
        success = grid.cells["success"]
        success = success[np.isfinite(success).any(axis=1)]
        if len(success):
            found = stats.wilson(float(np.nanmean(success, axis=1).sum()), len(success), confidence)
            out[name] = {"n": len(success), "success": _r(found.value), "lo": _r(found.lo), "hi": _r(found.hi)}
    return out


def _flat(name: str, found: Interval) -> dict[str, float]:
    return {name: _r(found.value), f"{name}_lo": _r(found.lo), f"{name}_hi": _r(found.hi)}


def _r(x: float) -> float:
    if not math.isfinite(x):
        raise DataError(f"A metric is {x}; an episode's numbers must be finite.")
    return round(float(x), 4)
