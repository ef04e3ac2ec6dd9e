"""Sentences from numbers. Says "raised" only where the interval excludes zero. Knows no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ragdistill.llm.ledger import UNTOLD, Spent
from ragdistill.progress import duration
from ragdistill.records import StopReason
from ragdistill.report.metrics import has_scores
from ragdistill.report.payback import Payback
from ragdistill.report.table import difference
from ragdistill.timing import COLD, Timing

DESCRIPTIONS = {
    "raw": "the model as published",
    "base": "the agent before distilling, no hints",
    "rag": "base with hints retrieved for the task",
    "rag_random": "control: base with hints of other task types",
    "rag_constant": "control: base with the same hints every time",
    "sft": "trained on base's own successes, no hints",
    "distilled": "trained on hinted successes with the hints removed, plays without hints",
    "sft_retry": "control: trained on a second unhinted attempt of the same budget",
    "distilled_random": "control: trained on successes under random hints",
}


def answer(m: Mapping[str, Any]) -> list[str]:
    """The page's opening: the answer, then what it must be read against; one sentence where there is no answer."""
    first = m["primary"]["paired"]
    if "distilled-base" not in first:
        return ["Base and distilled agent were not both evaluated, so there is no answer yet."]
    sentences = [_gain(m, first["distilled-base"])]
    if has_scores(m):
        sentences.append(_score(m, first["distilled-base"]))
    if "distilled-rag" in first:
        sentences.append(_against_hints(m, first["distilled-rag"]))
    rivals = [
        f"{100 * first[pair]['diff']:+.1f} points over {name} ({_interval(first[pair], m)})"
        for pair, name in _RIVALS.items()
        if pair in first
    ]
    if rivals:
        sentences.append(f"Against other ways of training: {'; '.join(rivals)}.")
    return [s.replace(" -", " \N{MINUS SIGN}").replace("(-", "(\N{MINUS SIGN}") for s in sentences]


_RIVALS = {
    "distilled-sft": "training on the base agent's own successes",
    "distilled-sft_retry": "training on a second unhinted attempt",
    "distilled-distilled_random": "distilling random hints",
}


def _gain(m: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    before, after = (m["primary"]["policies"][n]["success"] for n in ("base", "distilled"))
    where = f"On {row['n']} tasks never seen in training"
    values = f"success from {100 * before:.1f} % to {100 * after:.1f} %"
    numbers = f"({100 * row['diff']:+.1f} points, {_interval(row, m)})"
    if row["lo"] > 0:
        return f"{where}, distilling raised {values} {numbers}."
    if row["hi"] < 0:
        return f"{where}, distilling lowered {values} {numbers}."
    return f"{where}, the data do not show that distilling helps or harms: {values} {numbers}."


def _score(m: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The mean reward, where it says something that success does not."""
    before, after = (100 * m["primary"]["policies"][n]["score"] for n in ("base", "distilled"))
    diff, lo, hi = (100 * row[k] for k in ("score", "score_lo", "score_hi"))
    level = f"{100 * m['confidence']:g} % CI {lo:+.1f} to {hi:+.1f}"
    return f"The score (mean reward × 100) went from {before:.1f} to {after:.1f} ({diff:+.1f} points, {level})."


def _against_hints(m: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Tokens and success beside the agent that retrieves hints in every episode."""
    hinted = f"{100 * m['primary']['policies']['rag']['success']:.1f} %"
    versus = f"{100 * row['diff']:+.1f} points, {_interval(row, m)}"
    ratio = m["primary"]["tokens"].get("distilled_over_rag", {})
    if "billed" not in ratio:
        return f"Retrieving hints in every episode reaches {hinted} (distilled against it: {versus})."
    saved, best, worst = (100 * (1 - ratio[k]) for k in ("billed", "billed_lo", "billed_hi"))
    if worst > 0:
        cost = f"{saved:.0f} % fewer tokens (CI {worst:.0f} to {best:.0f} %) than"
    elif best < 0:
        cost = f"{-saved:.0f} % more tokens (CI {-best:.0f} to {-worst:.0f} %) than"
    else:
        bounds = f"{ratio['billed_lo']:.2f}–{ratio['billed_hi']:.2f}"
        cost = f"about as many tokens ({ratio['billed']:.2f} times, CI {bounds}) as"
    return f"It uses {cost} retrieving hints in every episode, which reaches {hinted} (distilled against it: {versus})."


def facts(m: Mapping[str, Any], costs: Sequence[Payback]) -> list[tuple[str, str, str]]:
    """(what, number, reading aid) of the few numbers that stand under the answer."""
    out: list[tuple[str, str, str]] = []
    level, first = f"{100 * m['confidence']:g} % CI", m["primary"]
    before, after = (first["policies"].get(n, {}) for n in ("base", "distilled"))
    if "success" in before and "success" in after:
        value = f"{100 * before['success']:.0f} % → {100 * after['success']:.0f} %"
        row = first["paired"].get("distilled-base", {})
        out.append(("Success on primary tasks, before → after", value, _points(row, level)))
        if has_scores(m):
            value = f"{100 * before['score']:.0f} → {100 * after['score']:.0f}"
            out.append(("Score on primary tasks, before → after", value, _points(difference(row, "score"), level)))
    rival = first["paired"].get("distilled-rag", {})
    if rival:
        value, note = _points(rival, level).split(" ", 1)
        out.append(("Success against hints in every episode", value, note))
    ratio = first["tokens"].get("distilled_over_rag", {})
    if "billed" in ratio:
        value, hi, lo = (signed(100 * (ratio[k] - 1), 0) for k in ("billed", "billed_hi", "billed_lo"))
        out.append(
            ("Tokens an episode, against those hints", f"{value} %", f"billed, primary tasks; {level} {lo} to {hi} %")
        )
    if costs:
        out.append(("Pays for itself after", *_payback(costs[0], level)))
    return out


def _payback(cost: Payback, level: str) -> tuple[str, str]:
    if cost.episodes is None:
        return "never", "it saves no billed tokens against hints in every episode"
    late = f"to {count(cost.latest)}" if cost.latest else "or more, perhaps never"
    return f"{count(cost.episodes)} episodes", f"in billed tokens, all tasks; {level} {count(cost.soonest or 0)} {late}"


def _points(row: Mapping[str, Any], level: str) -> str:
    if not row:
        return "not played on the same tasks"
    return f"{signed(100 * row['diff'])} points; {level} {signed(100 * row['lo'])} to {signed(100 * row['hi'])}"


def _interval(row: Mapping[str, Any], m: Mapping[str, Any]) -> str:
    p = "p < 0.001" if row["p"] < 0.001 else f"p = {row['p']:.3f}"
    return f"{100 * m['confidence']:g} % CI {100 * row['lo']:+.1f} to {100 * row['hi']:+.1f}, {p}"


STOPS = {
    StopReason.FAILURE: "the environment ended it without full reward",
    StopReason.MAX_STEPS: "the budget ran out",
    StopReason.LOOP: "the agent repeated itself without effect",
    StopReason.CONTEXT_FULL: "the game outgrew the prompt’s budget of tokens",
    StopReason.NO_ACTION: "replies without a command",
    StopReason.BAD_REPLY: "the server refused or broke off",
    StopReason.INFRA_ERROR: "engine, worker or endpoint failed; not counted",
}
"""What the reasons mean that need a word."""


UNRECORDED = "not recorded"
"""Of evaluations that do not say which engine played them."""


def mixed(engines: Mapping[str, str]) -> bool:
    """Whether policies of one comparison were played by different engines, or at different precisions."""
    return len({e for e in engines.values() if e != UNRECORDED}) > 1


def played_by(engines: Mapping[str, str]) -> str:
    """One engine's words, or which policy was played by which; `engines` is policy and seed → words."""
    if len(set(engines.values())) <= 1:
        return next(iter(engines.values()), UNRECORDED)
    by: dict[str, list[str]] = {}
    for name, engine in engines.items():
        by.setdefault(engine, []).append(name)
    return "; ".join(f"{engine} ({', '.join(names)})" for engine, names in by.items())


def wall_time(timings: Mapping[str, Timing]) -> list[tuple[str, str, str]]:
    """(stage, time, what that time is where it is not the last run's own work); longest first."""
    out: list[tuple[str, str, str]] = []
    for stage, t in sorted(timings.items(), key=lambda item: -item[1].best):
        aside = ""
        if t.replayed is None:
            aside = "not recorded whether this was a replay"
        elif t.cold is None:
            aside = f"{100 * t.replayed:.0f} % of it from the cache; a whole run was never timed here"
        elif t.replayed > COLD:
            aside = (
                f"when last run whole; the last run took {duration(t.seconds)}, {100 * t.replayed:.0f} % from the cache"
            )
        out.append((stage, duration(t.best), aside))
    return out


def paid(spending: Sequence[Spent]) -> str:
    """All money in one phrase, each currency by itself; "" where nothing was spent."""
    sums = {a.currency: (0.0, 0.0) for a in spending}
    for a in spending:
        money, unsure = sums[a.currency]
        sums[a.currency] = (money + a.money, unsure + a.unsure_money)
    return " and ".join(
        f"{money:.4f} {currency}" + (f" ({unsure:.4f} of it {UNTOLD})" if unsure else "")
        for currency, (money, unsure) in sums.items()
    )


def kind_name(kind: str) -> str:
    """`pick_clean_then_place_in_recep` → `pick clean then place in recep`."""
    return kind.replace("_", " ")


def count(value: float) -> str:
    """A number of steps or tokens: `1,435`, `24.7`, `0`."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}".removesuffix(".0")
    return text.replace("-", "\N{MINUS SIGN}")


def short(value: float) -> str:
    """`1.5k` for 1,500; what fits under an axis."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def signed(value: float, digits: int = 1) -> str:
    """`+20.0`, `−3.1` with a real minus, and `0` for what rounds to it."""
    text = f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text if text.strip("+\N{MINUS SIGN}0.") else "0"
