"""Calls to a `ChatModel` that are paid once: each finished reply is journaled by model, prompt and sampling.

Knows no prompt. Reads JSON replies strictly: one object of the asked form, nothing guessed.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from ragdistill.errors import DataError
from ragdistill.journal import Journal
from ragdistill.llm import ChatModel, Reply, Sampling
from ragdistill.records import Message, Usage, digest, utf8

CALL_VERSION = "hint-call-1"
"""Part of every call's key; another value pays all calls again."""

_LONGEST = 20_000
"""Characters of a reply that are still read."""

T = TypeVar("T")


class Asker:
    """A model, its journal, and a bound on calls at once. Equal calls wait for each other and are paid once."""

    def __init__(self, model: ChatModel, journal: Journal[Reply], concurrency: int) -> None:
        self.model, self._journal = model, journal
        self._gate = asyncio.Semaphore(concurrency)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.calls = self.replayed = 0
        """Answered calls, and how many of them came from the journal."""
        self.on_reply: Callable[[], object] = lambda: None
        """Called after each answered call, for a display."""
        self.usage = Usage()
        """Of all answered calls, replayed ones included: what the result costs, not what this run paid."""

    async def ask(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """The reply, from the journal if it was paid before; `EnvironmentFault` when the model fails."""
        key = digest(CALL_VERSION, self.model.fingerprint(), messages, sampling)
        async with self._locks[key]:
            reply = self._journal.get(key)
            self.replayed += reply is not None
            if reply is None:
                async with self._gate:
                    reply = await self.model.chat(messages, sampling)
                reply = msgspec.structs.replace(reply, text=utf8(reply.text))
                self._journal.put(key, reply)
        self.calls += 1
        self.usage += reply.usage
        self.on_reply()
        return reply


def read_object(text: str, form: type[T]) -> T:
    """The JSON object in `text` as `form`, prose and code fences around it aside.

    `DataError` says in a few words what is wrong with it: they go back to the model.
    """
    if len(text) > _LONGEST:
        raise DataError(f"it was longer than {_LONGEST} characters")
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise DataError("it held no JSON object")
    try:
        return msgspec.json.decode(text[start : end + 1].encode(), type=form)
    except (msgspec.DecodeError, RecursionError) as e:
        raise DataError(f"it was not a JSON object of that form ({e})") from None
