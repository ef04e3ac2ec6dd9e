"""Which numbers stand in which figure of the page. Knows no HTML and computes no estimate (`metrics`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ragdistill.records import StopReason, Trajectory
from ragdistill.report import words
from ragdistill.report.charts import IntervalChart, LineChart, Point, interval_chart, line_chart, stacked
from ragdistill.report.csvs import LossPoint
from ragdistill.report.hintuse import HintUse
from ragdistill.report.metrics import order, order_pairs
from ragdistill.report.table import difference, percent, points

_MAIN = ("base", "rag", "sft", "distilled")
"""Policies shown for each task kind and room."""
_LEAST = 3
"""Tasks that a room holds at least to be shown: a product that two goals ask for says nothing by itself."""
_COSTS = (
    ("steps", "steps an episode"),
    ("tokens_billed", "tokens an episode, billed"),
    ("tokens_computed", "tokens an episode, computed"),
    ("seconds", "seconds an episode (latency)"),
)


@dataclass(frozen=True)
class Ending:
    """How one policy's episodes ended."""

    policy: str
    parts: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Room:
    """Success of the main policies in one room."""

    name: str
    tasks: int
    cells: tuple[tuple[str, Mapping[str, Any] | None], ...]


def success_chart(m: Mapping[str, Any], field: str = "success") -> IntervalChart:
    """Success (or score) by policy: filled = primary tasks, hollow = all tasks."""
    rows = []
    for name in order(m["policies"]):
        first, rest = m["primary"]["policies"].get(name, {}), m["policies"][name]
        marks = [_mark(first, field, f"{name}, primary tasks")] if field in first else []
        marks += [_mark(rest, field, f"{name}, all tasks", hollow=True)] if field in rest else []
        unit = " %" if field == "success" else ""
        rows.append((name, name, f"{100 * first[field]:.0f}{unit}" if field in first else "–", marks))
    title = "success, % of tasks" if field == "success" else f"{field}, 0 to 100"
    return interval_chart(title, rows, lambda v: f"{v:g}", (0.0, 100.0))


def difference_chart(m: Mapping[str, Any], field: str = "success") -> IntervalChart | None:
    """The student's paired differences (and what hints add) on primary tasks; None where nothing can be compared."""
    paired = {name: difference(row, field) for name, row in m["primary"]["paired"].items()}
    rows = [
        (
            name.replace("-", " − "),
            name.split("-")[0],
            words.signed(100 * row["diff"], 0),
            [Point(100 * row["diff"], 100 * row["lo"], 100 * row["hi"], f"{name}: {points(row)}")],
        )
        for name, row in ((n, paired[n]) for n in order_pairs(paired) if n.startswith("distilled-") or n == "rag-base")
    ]
    title = f"difference of {field} on primary tasks, points"
    return interval_chart(title, rows, lambda v: words.signed(v, 0), zero=True) if rows else None


def kind_charts(m: Mapping[str, Any]) -> list[tuple[str, int, IntervalChart]]:
    """(kind, number of tasks, chart) for the main policies, primary kinds first."""
    out = []
    for kind in sorted(m["by_kind"], key=lambda k: (k not in m["primary"]["kinds"], k)):
        cells = m["by_kind"][kind]
        rows = [
            (
                n,
                n,
                f"{100 * c['success']:.0f} %",
                [Point(100 * c["success"], 100 * c["lo"], 100 * c["hi"], f"{n}, {kind}")],
            )
            for n, c in ((n, cells[n]) for n in order(cells) if n in _MAIN)
        ]
        if rows:
            tasks = max(c["n"] for c in cells.values())
            out.append((kind, tasks, interval_chart("success, %", rows, lambda v: f"{v:g}", (0.0, 100.0))))
    return out


def room_table(m: Mapping[str, Any]) -> tuple[list[str], list[Room]]:
    """(policies, rooms of `_LEAST` tasks or more, those with most first)."""
    names = [n for n in order({n for part in m["by_room"].values() for n in part}) if n in _MAIN]
    rooms = [
        Room(room, max(c["n"] for c in part.values()), tuple((n, part.get(n)) for n in names))
        for room, part in m["by_room"].items()
        if part
    ]
    return names, sorted((r for r in rooms if r.tasks >= _LEAST), key=lambda r: (-r.tasks, r.name))


def cost_charts(m: Mapping[str, Any]) -> list[IntervalChart]:
    """Mean steps, tokens and seconds by policy on all tasks."""
    out = []
    for metric, title in _COSTS:
        rows = []
        for name in order(m["policies"]):
            row = m["policies"][name]
            if metric in row:
                mark = Point(
                    row[metric], row[f"{metric}_lo"], row[f"{metric}_hi"], f"{name}: {words.count(row[metric])}"
                )
                rows.append((name, name, words.count(row[metric]), [mark]))
        out.append(interval_chart(title, rows, words.short))
    return out


def endings(trajectories: Mapping[str, Sequence[Trajectory]]) -> list[Ending]:
    """Why each policy's episodes ended, in a fixed order of reasons."""
    out = []
    for name in order(trajectories):
        counts = {stop: sum(t.stop == stop for t in trajectories[name]) for stop in StopReason}
        if any(counts.values()):
            out.append(Ending(name, stacked({stop.value: n for stop, n in counts.items() if n})))
    return out


def stops(endings: Sequence[Ending]) -> list[str]:
    """The stop reasons that `endings` show, for their legend."""
    shown = {stop for ending in endings for stop, _, _ in ending.parts}
    return [stop.value for stop in StopReason if stop in shown]


def loss_charts(losses: Mapping[str, Sequence[LossPoint]]) -> list[tuple[str, LineChart]]:
    """One chart a training variant, its seeds as lines: a cold start of 300 steps hides a student's 10."""
    variants: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(dict)
    for name, curve in losses.items():
        variant, _, seed = name.rpartition("-")
        label = f"seed {seed}" if variant and seed.isdigit() else name
        variants[variant if variant and seed.isdigit() else name][label] = [(float(p.step), p.loss) for p in curve]
    drawn = ((variant, line_chart(curves)) for variant, curves in variants.items())
    return [(variant, chart) for variant, chart in drawn if chart is not None]


def by_bucket(uses: Sequence[HintUse]) -> dict[str, list[HintUse]]:
    """Bucket → its hints, most mentioned first."""
    out: dict[str, list[HintUse]] = defaultdict(list)
    for use in sorted(uses, key=lambda u: (u.hint.bucket, -u.hint.mentions, -u.hint.score, u.hint.id)):
        out[use.hint.bucket].append(use)
    return dict(out)


def scalars(training: Mapping[str, Any]) -> dict[str, str]:
    """The plain values of a `training.json`, for people."""
    shown = {k: v for k, v in sorted(training.items()) if isinstance(v, str | int | float)}
    return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in shown.items()}


def _mark(row: Mapping[str, Any], field: str, title: str, hollow: bool = False) -> Point:
    value, lo, hi = (100 * row[k] for k in (field, f"{field}_lo", f"{field}_hi"))
    return Point(value, lo, hi, f"{title}: {percent(row, field)}", hollow)
