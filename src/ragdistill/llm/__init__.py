"""The `ChatModel` protocol: asynchronous `chat(messages, sampling) → Reply`. A model knows no task."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from ragdistill.records import Message, Record, Usage


class Sampling(Record, frozen=True, kw_only=True):
    """How one reply is drawn. `seed` makes a sampled reply a function of (messages, sampling)."""

    temperature: float = 0.0
    """0 = greedy."""
    top_p: float = 1.0
    max_tokens: int = 64
    seed: int = 0
    stop: tuple[str, ...] = ()
    schema: str = ""
    """JSON schema, as JSON text, that the reply should follow; engines that cannot constrain a reply ignore it."""


class Reply(Record, frozen=True, kw_only=True):
    """One completion."""

    text: str
    """The model's words; with finish "error" why there are none that could be played."""
    usage: Usage
    finish: str = "stop"
    """stop | length | context | error (refused, empty, malformed, cut short by the server)"""


class Engine(Record, frozen=True, kw_only=True):
    """What computes a model's replies, as people name it. All of it is also in the fingerprint, as far as known."""

    name: str
    version: str = ""
    precision: str = ""
    """Of weights, activations and KV cache; empty: a server's own affair."""
    device: str = ""
    """CPU or GPU; empty: not known."""

    def words(self) -> str:
        """`OpenVINO GenAI 2026.4.1, bfloat16, CPU`."""
        return ", ".join(filter(None, (f"{self.name} {self.version}".rstrip(), self.precision, self.device)))


class ChatModel(Protocol):
    """Anything that answers chats: the local engine, an endpoint, a script."""

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        """Answer. Calls with the same non-empty `conversation` extend one another, so its KV cache may be kept.

        Raises `errors.EnvironmentFault` on infrastructure failure.
        """
        ...

    async def forget(self, conversation: str) -> None:
        """Free what is kept for `conversation`."""
        ...

    def close(self) -> None:
        """Stop computing and free what the model holds; calls that still wait raise `EnvironmentFault`."""
        ...

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Prompt length in tokens, for the context budget."""
        ...

    def fingerprint(self) -> str:
        """Identity of weights, tokenizer, precision and engine version."""
        ...


def context_limit(model: ChatModel) -> int:
    """Tokens of prompt and reply that `model` holds (attribute `context`); no limit where it says nothing."""
    said = getattr(model, "context", None)
    return said if isinstance(said, int) else sys.maxsize


def slots_of(model: ChatModel) -> int | None:
    """Conversations whose computed tokens `model` keeps (attribute `slots`); None where it keeps them in another way.

    With more of them at once, each would lose its own to another one between its turns.
    """
    said = getattr(model, "slots", None)
    return said if isinstance(said, int) else None


def engine_of(model: ChatModel) -> Engine:
    """What `model` says of its engine (attribute `engine`); the name of its class where it says nothing."""
    said = getattr(model, "engine", None)
    return said if isinstance(said, Engine) else Engine(name=type(model).__name__)
