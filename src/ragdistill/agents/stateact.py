"""StateAct (arXiv 2410.02810): each turn restates the goal and the state before one thought and one action.

    Goal: put a clean potato in fridge
    Current location: sinkbasin 1
    Current inventory: potato 1
    Locations visited: cabinet 1 2, countertop 1
    Thought: I have potato 1. It must be clean. Clean it with sinkbasin.
    Action: clean potato 1 with sinkbasin 1

Which fields the state has is the environment's business (a shop has `Current selection`): any `Label: text` line before
the thought is one, the goal among them. Where hints stand is as in `react`. Knows nothing of the environment beyond
its texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ragdistill.agents import Parsed
from ragdistill.agents.turns import LABELLED, one_line, render_chat, said, split_action, split_thought, unbroken
from ragdistill.records import Message, Step

SYSTEM = (
    "You play a text game. Each turn write, one line each: the Goal; the state you keep track of (Current location, "
    "Current inventory, Locations visited, or Current selection); one Thought; and one Action."
)

_LABEL = re.compile(r"[a-z](?:[a-z ]{0,28}[a-z])?")
_FIELD = re.compile(LABELLED % r"[a-z][a-z \t]*", re.IGNORECASE | re.MULTILINE)
_RESERVED = frozenset({"thought", "think", "action", "observation", "hint", "hints", "system", "user", "assistant"})
"""Labels that are no state: other parts of a turn, and speakers that a reply may imagine."""


class StateAct:
    """Goal + state + Thought + Action."""

    name = "stateact"
    version = "stateact-2"
    states = True

    def render(self, first_observation: str, hints: Sequence[str], steps: Sequence[Step]) -> list[Message]:
        return render_chat(SYSTEM, first_observation, hints, steps)

    def parse(self, reply: str) -> Parsed:
        """The first `Action:` line counts, the first `Thought:` line before it, and the first line of each field."""
        head, action = split_action(reply)
        before, thought = split_thought(head)
        state: dict[str, str] = {}
        for match in _FIELD.finditer(before):
            label, value = _label(match.group(1)), one_line(said(match))
            if label and value:
                state.setdefault(label, value)
        return Parsed(thought=one_line(thought), action=action, state=state)

    def reply(self, thought: str, action: str, state: Mapping[str, str] | None = None) -> str:
        """Fields in their given order; those without a text, or with a label that is none, are left out."""
        fields = {_label(label): one_line(value) for label, value in (state or {}).items()}
        lines = [f"{label.capitalize()}: {value}" for label, value in fields.items() if label and value]
        if thought := one_line(thought):
            lines.append(f"Thought: {thought}")
        return "\n".join([*lines, f"Action: {unbroken(action)}"])


def _label(text: str) -> str:
    """The label in canonical form; empty when `text` may not be one."""
    label = one_line(text).lower()
    return label if _LABEL.fullmatch(label) and label not in _RESERVED else ""
