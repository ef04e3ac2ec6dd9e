"""What a run says of itself in a few words: a name, a note in Markdown, and the numbers that stand first.

Reads the metrics alone. Knows no MLflow, whose run page shows this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ragdistill.report import words
from ragdistill.report.metrics import order
from ragdistill.report.table import policy_table

HEADLINE = "headline"
"""Group of the metrics that answer the question."""
_MEANS = ("success", "score", "steps", "invalid", "tokens_billed", "tokens_computed", "seconds")


def run_name(m: Mapping[str, Any]) -> str:
    """`evidence alfworld/react distilled 72 % (base 0 %)`: success on primary tasks."""
    found = {n: f"{n} {100 * p['success']:.0f} %" for n, p in m["primary"]["policies"].items() if "success" in p}
    first = [found[n] for n in ("distilled",) if n in found] or [found[n] for n in order(found)[-1:]]
    base = [f"({found['base']})"] if "base" in found and first != [found["base"]] else []
    return " ".join([f"{m['label']} {m['env']}/{m['agent']}", *first, *base])


def note(m: Mapping[str, Any], report: str) -> str:
    """The answer, the policies with intervals, and where the page is (`report`: its address), as Markdown."""
    answer, limits = words.answer(m), []
    if m["label"] == "smoke":
        limits.append("**Smoke, not evidence:** this run only shows that the pipeline works.")
    kinds = ", ".join(map(words.kind_name, m["primary"]["kinds"])) or "all"
    limits.append(f"Primary task kinds: {kinds}.")
    return "\n\n".join([
        f"**{answer[0]}**", *answer[1:], *limits, f"[The whole report]({report}): one page, artifact `report.html`.",
        policy_table(m),
    ])  # fmt: skip


def headline(m: Mapping[str, Any]) -> dict[str, float]:
    """Success on primary tasks and what the student gains, as shares (0-1); tokens as ratio."""
    first, out = m["primary"], dict[str, float]()
    for name in ("base", "rag", "sft", "distilled"):
        if "success" in first["policies"].get(name, {}):
            out[f"success_{name}"] = first["policies"][name]["success"]
    for rival in ("base", "rag", "sft"):
        row = first["paired"].get(f"distilled-{rival}", {})
        if row:
            out |= {f"gain_over_{rival}{end}": row[key] for end, key in (("", "diff"), ("_lo", "lo"), ("_hi", "hi"))}
    ratio = first["tokens"].get("distilled_over_rag", {})
    if "billed" in ratio:
        out["tokens_billed_over_rag"] = ratio["billed"]
    return {f"{HEADLINE}/{key}": value for key, value in out.items()}


def shown(m: Mapping[str, Any]) -> dict[str, float]:
    """The headline, then means of every policy, its differences and its success by task kind, without intervals.

    Groups stand before a slash and are named so that their alphabetical order is that of their weight. All the rest
    (intervals, rooms, counts) stands in `metrics.json`.
    """
    out = headline(m)
    out |= {f"kinds/{k}.{name}": row["success"] for k, rows in m["by_kind"].items() for name, row in rows.items()}
    for group, part in (("policies_primary", m["primary"]), ("policies", m)):
        out |= {f"{group}/{n}.{f}": float(row[f]) for n, row in part["policies"].items() for f in _MEANS if f in row}
        out |= {f"{group}/{pair}.success": row["diff"] for pair, row in part["paired"].items()}
    return out
