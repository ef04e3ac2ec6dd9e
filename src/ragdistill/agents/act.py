"""Act: each turn is one line of action and nothing else (the action-only prompt of arXiv 2210.03629).

A reply that thinks aloud nevertheless is read for its action alone. Where hints stand is as in `react`. Knows nothing
of the environment beyond its texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ragdistill.agents import Parsed
from ragdistill.agents.turns import render_chat, split_action, unbroken
from ragdistill.records import Message, Step

SYSTEM = "You play a text game. Each turn write one Action."


class Act:
    """Action alone."""

    name = "act"
    version = "act-2"
    states = False

    def render(self, first_observation: str, hints: Sequence[str], steps: Sequence[Step]) -> list[Message]:
        return render_chat(SYSTEM, first_observation, hints, steps)

    def parse(self, reply: str) -> Parsed:
        """The first `Action:` line counts, wherever it stands."""
        return Parsed(thought="", action=split_action(reply)[1])

    def reply(self, thought: str, action: str, state: Mapping[str, str] | None = None) -> str:
        """An Act turn has no place for a `thought` or a `state`; both are left out."""
        return f"Action: {unbroken(action)}"
