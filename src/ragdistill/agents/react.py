"""ReAct (arXiv 2210.03629): each turn is one line of thought and one line of action.

Knows nothing of the environment beyond its texts. Hints stand after the task, in the first user message, as in
arXiv 2510.01375 §3; they come from a field, so a trajectory rendered with `hints=()` is hint-free by construction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ragdistill.agents import Parsed
from ragdistill.agents.hint_block import render_hints
from ragdistill.records import Message, Step

SYSTEM = "You play a text game. Each turn write one Thought and one Action."

_ACTION = re.compile(r"^[ \t>*]*action[ \t]*\d*[ \t]*:[ \t]*(.*)$", re.IGNORECASE | re.MULTILINE)
_THOUGHT = re.compile(r"^[ \t>*]*(?:thought|think)[ \t]*\d*[ \t]*:[ \t]*(.*)$", re.IGNORECASE | re.MULTILINE)
_MAX_ACTION = 200
"""Characters; longer "actions" are runaway text and count as none."""


class ReAct:
    """Thought + Action."""

    name = "react"
    version = "react-1"

    def render(self, first_observation: str, hints: Sequence[str], steps: Sequence[Step]) -> list[Message]:
        opening = first_observation.strip()
        if hints:
            opening = f"{opening}\n\n{render_hints(hints)}"
        chat = [Message(role="system", content=SYSTEM), Message(role="user", content=opening)]
        for step in steps:
            chat.append(Message(role="assistant", content=step.reply.strip()))
            chat.append(Message(role="user", content=step.observation.strip()))
        return chat

    def parse(self, reply: str) -> Parsed:
        """The first `Action:` line counts: what follows it is an imagined continuation."""
        match = _ACTION.search(reply)
        head = reply[: match.start()] if match else reply
        thought = _THOUGHT.search(head)
        action = match.group(1).strip().lstrip("`\"' ").rstrip("`\"'. ") if match else ""
        if len(action) > _MAX_ACTION:
            action = ""
        return Parsed(thought=thought.group(1).strip() if thought else "", action=action)

    def reply(self, thought: str, action: str) -> str:
        thought, action = " ".join(thought.split()), " ".join(action.split())
        return f"Thought: {thought}\nAction: {action}" if thought else f"Action: {action}"
