"""What the prompt styles share: the chat around the replies, and reading labelled lines of untrusted text.

Knows no style: which labels a reply has, and in which order, is the agent's business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ragdistill.agents.hint_block import render_hints
from ragdistill.records import Message, Step

LABELLED = r"^[ \t>*]*(%s)(?:\*\*[ \t]*)?:(?:\*\*)?[ \t]*(.*)$"
"""A line of a reply: label, text. Capable models like to write the label, or the whole line, in bold."""
_ACTION = re.compile(LABELLED % r"action[ \t]*(?:\d+[ \t]*)?", re.IGNORECASE | re.MULTILINE)
_THOUGHT = re.compile(LABELLED % r"(?:thought|think)[ \t]*(?:\d+[ \t]*)?", re.IGNORECASE | re.MULTILINE)
_WRAPPING = re.compile(r"^[\s`\"']+|[\s`\"'.]+$")
"""What models like to put around a command."""
MAX_ACTION = 500
"""Characters; longer "actions" are runaway text and count as none. A search of WebShop has up to 283 (a whole goal)."""


def render_chat(system: str, first_observation: str, hints: Sequence[str], steps: Sequence[Step]) -> list[Message]:
    """System text, task with the block of hints after it, then replies (verbatim) and observations in turn."""
    opening = first_observation.strip()
    if hints:
        opening = f"{opening}\n\n{render_hints(hints)}"
    chat = [Message(role="system", content=system), Message(role="user", content=opening)]
    for step in steps:
        chat.append(Message(role="assistant", content=step.reply.strip()))
        chat.append(Message(role="user", content=step.observation.strip()))
    return chat


def split_action(reply: str) -> tuple[str, str]:
    """(what stands before the first `Action:` line, its command); what follows it is an imagined continuation."""
    match = _ACTION.search(reply)
    if match is None:
        return reply, ""
    action = _WRAPPING.sub("", unbroken(said(match)))
    return reply[: match.start()], action if len(action) <= MAX_ACTION else ""


def split_thought(head: str) -> tuple[str, str]:
    """(what stands before the first `Thought:` line, its text)."""
    match = _THOUGHT.search(head)
    return (head[: match.start()], said(match)) if match else (head, "")


def said(match: re.Match[str]) -> str:
    """The text of a `LABELLED` line; where its label began in bold, without the end of that."""
    bold = "**" in match.string[match.start() : match.start(2)]
    return match.group(2).strip().removesuffix("**" if bold else "").strip()


def unbroken(text: str) -> str:
    """A command on one line, all else of it as it is: a label may hold two spaces, and none but itself names it."""
    return " ".join(text.splitlines()).strip()


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks of any alphabet included, as one space."""
    return " ".join(text.split())
