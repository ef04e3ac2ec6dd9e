"""Prompt lengths for a model whose tokenizer is elsewhere. Knows no server and no prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ragdistill.errors import ConfigError
from ragdistill.records import Message

_PER_MESSAGE = 8
"""Tokens a chat template puts around a message; ChatML takes four or five."""
_MARKUP_BYTES = 32
"""The longest that is written around a message: `<|start_header_id|>`, the role, `<|eot_id|>` are one token each."""
_BYTES_PER_TOKEN = 3
"""English prose has more than four; fewer count too much, which costs context and never overruns it."""


def estimate_tokens(messages: Sequence[Message]) -> int:
    """A high estimate of the prompt's tokens, from its bytes."""
    return sum(-(-_bytes(m) // _BYTES_PER_TOKEN) + _PER_MESSAGE for m in messages)


def bound_tokens(messages: Sequence[Message]) -> int:
    """At most so many tokens: none of a byte-level vocabulary is shorter than a byte."""
    return sum(_bytes(m) + _MARKUP_BYTES for m in [*messages, Message(role="assistant", content="")])


def _bytes(message: Message) -> int:
    return len(message.content.encode("utf-8", "replace"))


def counter(tokenizer: str | None) -> tuple[Callable[[Sequence[Message]], int], str]:
    """How prompts are counted, and that in words.

    With the chat template of the tokenizer in the directory `tokenizer`; `ConfigError` when there is none.
    """
    if tokenizer is None:
        return estimate_tokens, f"estimated at {_BYTES_PER_TOKEN} bytes a token"
    if not Path(tokenizer).is_dir():
        raise ConfigError(f"endpoint.tokenizer {tokenizer!r} is no directory; name one with a tokenizer, or null.")
    from ragdistill.llm.chat_format import ChatFormat, load_tokenizer

    form = ChatFormat(load_tokenizer(Path(tokenizer)))
    return lambda messages: len(form.prompt_ids(messages)), "counted by endpoint.tokenizer"
