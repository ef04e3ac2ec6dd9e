"""A trajectory as a language model reads it: defused, and cut in the middle to a budget of tokens.

The head says what was asked and how the agent began, the tail how it ended; what lies between is named and left out.
Knows no prompt and no model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from ragdistill.hints.safety import defuse
from ragdistill.records import Step, Trajectory

_TEXT = 800
"""Characters of one observation or goal; a shop's page can be many times as long."""
_HEAD_SHARE = 3
"""One kept turn of so many belongs to the head: how an episode ended says more than how it began."""


def transcript(t: Trajectory, budget: int, count: Callable[[str], int]) -> str | None:
    """`t` in at most `budget` tokens as `count` counts them; None when not even its frame fits."""
    turns = [_turn(i, s) for i, s in enumerate(t.steps, 1)]
    head = [f"Task: {clip(t.goal, _TEXT)}", f"First observation: {clip(t.first_observation, _TEXT)}"]
    outcome = "success" if t.success else "failure"
    tail = [f"Outcome: {outcome} after {len(turns)} turns ({t.stop.value})"]

    def text(kept: int) -> str:
        first = -(-kept // _HEAD_SHARE)
        last = len(turns) - (kept - first)
        gap = [f"[{last - first} turns left out]"] if last > first else []
        return "\n".join([*head, *turns[:first], *gap, *turns[last:], *tail])

    if count(whole := text(len(turns))) <= budget:
        return whole
    kept = bisect_left(range(len(turns)), True, key=lambda n: count(text(n)) > budget) - 1
    return text(kept) if kept >= 0 else None


def clip(text: str, limit: int) -> str:
    """`text` defused and on one line, with its middle left out beyond `limit` characters."""
    text = " ".join(defuse(text).split())
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} [cut] {text[-half:]}"


def _turn(number: int, step: Step) -> str:
    thought = f"\n  thought: {clip(step.thought, _TEXT)}" if step.thought else ""
    command = clip(step.action, _TEXT) or "(none)"
    refused = "" if step.valid else " (refused)"
    return f"Turn {number}{thought}\n  command: {command}\n  observation{refused}: {clip(step.observation, _TEXT)}"
