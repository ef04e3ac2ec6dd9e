"""The metrics as Markdown tables that also read well in a terminal. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ragdistill.report.metrics import has_scores, order, order_pairs


def policy_table(metrics: Mapping[str, Any]) -> str:
    """Policies with intervals (primary and all tasks, costs on all), then paired differences in points.

    The score (mean reward × 100) stands beside success where the two differ for some policy, and both once more
    without the infeasible tasks where some were played. Then come the parts of the reward, where it has parts.
    """
    everything = metrics["policies"]
    fields = ("success", "score") if has_scores(metrics) else ("success",)
    sets = {name: part["policies"] for name, part in task_sets(metrics).items()}
    shares = [(f"{field} %" if field == "success" else field, field, name) for field in fields for name in sets]
    costs = ("steps", "tokens_billed", "tokens_computed", "invalid")
    head = ("policy", *(f"{words}, {name}" for words, _, name in shares), *(c.replace("_", " ") for c in costs))
    rows = [
        (
            policy,
            *(percent(sets[name].get(policy, {}), field) for _, field, name in shares),
            *(_number(everything[policy], field) for field in costs),
        )
        for policy in order(everything)
    ]
    level = f"{100 * metrics['confidence']:g} %"
    seeds = ", ".join(map(str, metrics["seeds"]))
    infra = sum(p["infra"] for p in everything.values())
    caption = (
        f"{metrics['env']} / {metrics['agent']} / {metrics['split']}, {metrics['label']}: "
        f"{metrics['primary']['tasks']} primary of {metrics['tasks']} tasks, training seeds {seeds}, "
        f"[{level} interval]; {infra} episodes lost to infrastructure are left out."
        f"{' Score: mean reward × 100.' if 'score' in fields else ''}"
        + (f" {metrics['task_note']}" if "task_note" in metrics else "")
        + (f" Played by {metrics['engine']}." if "engine" in metrics else "")
    )
    pairs = ("difference of success", "primary, points", "p", "all, points", "p")
    pairs += ("score, primary, points", "score, all, points") if "score" in fields else ()
    compared = [_pair(name, metrics, "score" in fields) for name in order_pairs(metrics["paired"])]
    tables = [(head, rows), (pairs, compared), _parts(metrics.get("parts", {}))]
    return "\n\n".join([caption, *(_markdown(head, rows) for head, rows in tables if rows)]) + "\n"


def comparison_table(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Several evaluations as one: each policy on primary tasks, then what distilling gained; (name, metrics) each."""
    fields = ("success", "score") if any(has_scores(m) for _, m in found) else ("success",)
    shares = ["success %", "score"][: len(fields)]
    head = ("cell", "experiment", "policy", "n", *(f"{s}, primary" for s in shares), "steps", "tokens billed")
    rows: list[tuple[str, ...]] = []
    gains: list[tuple[str, ...]] = []
    for name, m in found:
        cell, first, costs = (f"{m['env']} / {m['agent']} / {m['split']}", name), m["primary"], m["policies"]
        for policy in order(costs):
            row, numbers = first["policies"].get(policy, {}), ("steps", "tokens_billed")
            cells = (*(percent(row, f) for f in fields), *(_number(costs[policy], n) for n in numbers))
            rows.append((*cell, policy, str(row.get("n", 0)), *cells))
        for pair in (p for p in order_pairs(first["paired"]) if p in ("distilled-base", "distilled-rag")):
            row, ratio = first["paired"][pair], first["tokens"].get(pair.replace("-", "_over_"), {})
            tokens = f"{ratio['billed']:.2f} [{ratio['billed_lo']:.2f}–{ratio['billed_hi']:.2f}]" if ratio else "–"
            scores = [points(difference(row, f)) for f in fields]
            gains.append((*cell, pair.replace("-", " − "), str(row["n"]), *scores, p_value(row), tokens))
    words = ("cell", "experiment", "difference on primary tasks", "n", *(f"{f}, points" for f in fields))
    tables = [(head, rows), ((*words, "p of success", "tokens billed, ratio"), gains)]
    return "\n\n".join(_markdown(head, rows) for head, rows in tables if rows) + "\n"


def task_sets(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name → numbers on primary and on all tasks; on both without the infeasible ones where some were played."""
    found = metrics.get("feasible", {})
    sets = {"primary": metrics["primary"], "all": metrics, "feasible primary": found.get("primary"), "feasible": found}
    return {name: part for name, part in sets.items() if part}


def percent(row: Mapping[str, Any], field: str = "success") -> str:
    """`62.5 [51.2–72.6]`, or a dash where nothing finished."""
    if field not in row:
        return "–"
    return f"{100 * row[field]:.1f} [{100 * row[f'{field}_lo']:.1f}–{100 * row[f'{field}_hi']:.1f}]"


def points(row: Mapping[str, Any]) -> str:
    """`+12.5 [+3.1, +21.9]`, or a dash."""
    return f"{100 * row['diff']:+.1f} [{100 * row['lo']:+.1f}, {100 * row['hi']:+.1f}]" if row else "–"


def difference(row: Mapping[str, Any], field: str) -> dict[str, float]:
    """The difference of `field` in a row of paired numbers, under the names that success has there."""
    keys = ("diff", "lo", "hi") if field == "success" else (field, f"{field}_lo", f"{field}_hi")
    return {name: row[key] for name, key in zip(("diff", "lo", "hi"), keys, strict=True)} if row else {}


def p_value(row: Mapping[str, Any]) -> str:
    """`0.013`, `<0.001`, or a dash."""
    if not row:
        return "–"
    return "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"


def _pair(name: str, metrics: Mapping[str, Any], scored: bool) -> tuple[str, ...]:
    first, rest = metrics["primary"]["paired"].get(name, {}), metrics["paired"][name]
    scores = [points(difference(row, "score")) for row in (first, rest)] if scored else []
    return (name.replace("-", " − "), points(first), p_value(first), points(rest), p_value(rest), *scores)


def part_names(parts: Mapping[str, Any]) -> list[str]:
    """Parts of the reward that some policy earned, in name order: a file that was read back has no other."""
    return sorted({name for row in parts.values() for name in row} - {"n"})


def _parts(parts: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: the mean of each part of the reward over the episodes that earned one."""
    names = part_names(parts)
    rows = [
        (p, f"{parts[p]['n']}", *(f"{100 * parts[p][n]:.1f}" if n in parts[p] else "–" for n in names))
        for p in order(parts)
    ]
    return ("parts of the reward, %", "episodes", *names), rows


def _number(row: Mapping[str, Any], field: str) -> str:
    """`17.6 [15.2–20.0]`, `23,060 [18,734–27,604]`, bare where the field has no interval, or a dash."""
    if field not in row:
        return "–"
    digits = 0 if row[field] >= 1000 else 1
    value, *ends = (f"{row[key]:,.{digits}f}" for key in (field, f"{field}_lo", f"{field}_hi") if key in row)
    return f"{value} [{'–'.join(ends)}]" if ends else value


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])
