"""Prompt lengths for a model whose tokenizer is elsewhere. Knows no server and no prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ragdistill.errors import ConfigError
from ragdistill.records import Message

_PER_MESSAGE = 8
"""Tokens a chat template puts around a message; ChatML takes four or five."""
_BYTES_PER_TOKEN = 3
"""English prose has more than four; fewer count too much, which costs context and never overruns it."""


def estimate_tokens(messages: Sequence[Message]) -> int:
    """A high estimate of the prompt's tokens, from its bytes."""
    return bound_tokens(messages, _BYTES_PER_TOKEN)


def bound_tokens(messages: Sequence[Message], bytes_per_token: int = 1) -> int:
    """At most so many tokens: none of a byte-level vocabulary is shorter than a byte."""
    return sum(-(-len(m.content.encode("utf-8", "replace")) // bytes_per_token) + _PER_MESSAGE for m in messages)


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
