"""ReAct (arXiv 2210.03629): each turn is one line of thought and one line of action.

Knows nothing of the environment beyond its texts. Hints stand after the task, in the first user message, as in
arXiv 2510.01375 §3; they come from a field, so a trajectory rendered with `hints=()` is hint-free by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ragdistill.agents import Parsed
from ragdistill.agents.turns import one_line, render_chat, split_action, split_thought, unbroken
from ragdistill.records import Message, Step

SYSTEM = "You play a text game. Each turn write one Thought and one Action."


class ReAct:
    """Thought + Action."""

    name = "react"
    version = "react-2"
    states = False

    def render(self, first_observation: str, hints: Sequence[str], steps: Sequence[Step]) -> list[Message]:
        return render_chat(SYSTEM, first_observation, hints, steps)

    def parse(self, reply: str) -> Parsed:
        """The first `Action:` line counts: what follows it is an imagined continuation."""
        head, action = split_action(reply)
        return Parsed(thought=split_thought(head)[1], action=action)

    def reply(self, thought: str, action: str, state: Mapping[str, str] | None = None) -> str:
        """A ReAct turn has no place for a `state`; it is left out."""
        thought, action = one_line(thought), unbroken(action)
        return f"Thought: {thought}\nAction: {action}" if thought else f"Action: {action}"
