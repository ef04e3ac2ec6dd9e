"""The metrics as Markdown tables that also read well in a terminal. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ragdistill.report.metrics import order, order_pairs


def policy_table(metrics: Mapping[str, Any]) -> str:
    """Policies with intervals (primary and all tasks, costs on all), then paired differences of success in points."""
    everything, primary = metrics["policies"], metrics["primary"]["policies"]
    head = ("policy", "success %, primary", "success %, all", "steps", "tokens billed", "tokens computed", "invalid")
    rows = [
        (
            name,
            percent(primary.get(name, {})),
            percent(everything[name]),
            *(_number(everything[name], field) for field in ("steps", "tokens_billed", "tokens_computed", "invalid")),
        )
        for name in order(everything)
    ]
    level = f"{100 * metrics['confidence']:g} %"
    seeds = ", ".join(map(str, metrics["seeds"]))
    infra = sum(p["infra"] for p in everything.values())
    caption = (
        f"{metrics['env']} / {metrics['agent']} / {metrics['split']}, {metrics['label']}: "
        f"{metrics['primary']['tasks']} primary of {metrics['tasks']} tasks, training seeds {seeds}, "
        f"[{level} interval]; {infra} episodes lost to infrastructure are left out."
        + (f" Played by {metrics['engine']}." if "engine" in metrics else "")
    )
    pairs = ("difference of success", "primary, points", "p", "all, points", "p")
    compared = [_pair(name, metrics) for name in order_pairs(metrics["paired"])]
    return "\n\n".join([caption, _markdown(head, rows), *([_markdown(pairs, compared)] if compared else [])]) + "\n"


def percent(row: Mapping[str, Any]) -> str:
    """`62.5 [51.2–72.6]`, or a dash where nothing finished."""
    if "success" not in row:
        return "–"
    return f"{100 * row['success']:.1f} [{100 * row['success_lo']:.1f}–{100 * row['success_hi']:.1f}]"


def points(row: Mapping[str, Any]) -> str:
    """`+12.5 [+3.1, +21.9]`, or a dash."""
    return f"{100 * row['diff']:+.1f} [{100 * row['lo']:+.1f}, {100 * row['hi']:+.1f}]" if row else "–"


def p_value(row: Mapping[str, Any]) -> str:
    """`0.013`, `<0.001`, or a dash."""
    if not row:
        return "–"
    return "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"


def _pair(name: str, metrics: Mapping[str, Any]) -> tuple[str, ...]:
    first, rest = metrics["primary"]["paired"].get(name, {}), metrics["paired"][name]
    return (name.replace("-", " − "), points(first), p_value(first), points(rest), p_value(rest))


def _number(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        return "–"
    return f"{row[field]:,.0f}" if row[field] >= 1000 else f"{row[field]:.1f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])
