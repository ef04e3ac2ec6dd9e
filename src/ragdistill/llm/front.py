"""The front of an in-process engine: asyncio calls go in, one background thread owns the model and answers them.

It knows neither a model nor how one is run: an engine says how to take calls in, advance and fail (`_serve`).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ragdistill.errors import EnvironmentFault, lacks_memory
from ragdistill.llm import Reply, Sampling
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.records import Message, Usage


@dataclass(slots=True)
class Call:
    """One `chat` call on its way through an engine."""

    prompt: list[int]
    sampling: Sampling
    conversation: str
    future: Future[Reply]
    generated: list[int] = field(default_factory=list)
    reused: int = 0
    """Prompt tokens that were computed before."""
    handle: Any = None
    """What the engine's library calls this request."""

    def answer(self, text: str, finish: str) -> None:
        """Resolve the future, unless its caller has gone."""
        prompt, completion = len(self.prompt), len(self.generated)
        computed = prompt - self.reused + completion
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion, computed_tokens=computed)
        with suppress(InvalidStateError):  # it may go at any moment
            self.future.set_result(Reply(text=text, usage=usage, finish=finish))


class ThreadedEngine:
    """A `ChatModel` whose model is owned by one background thread.

    A subclass sets itself up, then calls `_start`; its `_serve` runs in the thread, takes calls and forgotten
    conversations from `_inbox` until it finds None there, and resolves every call.
    """

    label: str
    """As it stands in messages."""

    def __init__(self, form: ChatFormat, context: int, fingerprint: str) -> None:
        self._format, self.context, self._fingerprint = form, context, fingerprint
        self._inbox: queue.SimpleQueue[Call | str | None] = queue.SimpleQueue()
        self._closed = False

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        """Answer; see `ChatModel.chat`. A prompt that fills the context returns at once with finish "context"."""
        if self._closed:
            raise self._gone()
        call = Call(self._format.prompt_ids(messages), sampling, conversation, Future())
        if len(call.prompt) >= self.context:
            return Reply(text="", usage=Usage(prompt_tokens=len(call.prompt)), finish="context")
        self._inbox.put(call)
        return await asyncio.wrap_future(call.future)

    async def forget(self, conversation: str) -> None:
        """The conversation has ended: what is kept of it may go."""
        self._inbox.put(conversation)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Prompt length in tokens."""
        return len(self._format.prompt_ids(messages))

    def fingerprint(self) -> str:
        """Identity of weights, adapter, tokenizer, precision and engine."""
        return self._fingerprint

    def close(self) -> None:
        """Stop the thread and free the model; calls that still wait raise `EnvironmentFault`."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
            self._thread.join()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name=f"ragdistill-{type(self).__name__}", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        raise NotImplementedError

    def _gone(self) -> EnvironmentFault:
        return EnvironmentFault(f"The {self.label} engine was closed; make a new one.")

    def _broken(self, error: Exception) -> EnvironmentFault:
        if short := lacks_memory(error):
            return EnvironmentFault(
                f"The {self.label} engine had not enough memory for a step ({short}); lower model.concurrency"
            )
        return EnvironmentFault(f"The {self.label} engine failed in a step: {type(error).__name__}: {error}")

    def _refuse(self, calls: list[Call], fault: EnvironmentFault) -> None:
        """Hand `fault` to `calls` and to all that wait in the inbox."""
        while not self._inbox.empty():
            item = self._inbox.get()
            calls = [*calls, item] if isinstance(item, Call) else calls
        for call in calls:
            with suppress(InvalidStateError):
                call.future.set_exception(fault)
