"""Which conversation does a request go on? HTTP clients send whole chats, engines keep one KV cache a conversation.

A request continues the conversation whose last state (its messages and the reply) is the longest beginning of the
request. States are kept as hashes. A conversation is handed out to one request at a time. This module knows no HTTP.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

from ragdistill.records import Message


class Conversations:
    """`claim` → name; after the reply `keep`. Names that `keep` returns are to be forgotten by the engine."""

    def __init__(self, size: int) -> None:
        """Remember the last states of `size` conversations."""
        self._size, self._count = size, count(1)
        self._states: OrderedDict[bytes, str] = OrderedDict()

    def claim(self, messages: Sequence[Message]) -> str:
        """The conversation that `messages` goes on, or a new one; nobody else gets it before it is kept again."""
        for state in reversed(_states(messages)):
            if state in self._states:
                return self._states.pop(state)
        return f"http-{next(self._count)}"

    def keep(self, messages: Sequence[Message], reply: str, name: str) -> list[str]:
        """`name` now ends with `reply`; returns conversations that make room for it."""
        state = _states([*messages, Message(role="assistant", content=reply)])[-1]
        gone = [self._states.pop(state)] if state in self._states else []
        self._states[state] = name
        while len(self._states) > self._size:
            gone.append(self._states.popitem(last=False)[1])
        return gone


def _states(messages: Sequence[Message]) -> list[bytes]:
    """Hash of each beginning of `messages`."""
    states: list[bytes] = []
    last = b""
    for message in messages:
        content = hashlib.sha256(message.content.encode("utf-8", "surrogatepass")).digest()
        last = hashlib.sha256(last + message.role.encode() + b"\0" + content).digest()
        states.append(last)
    return states
