"""A `ChatModel` that answers from a Python function: for tests and for running the DAG without a model.

Usage is counted as a real engine with prefix reuse would, in whitespace-separated words instead of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ragdistill.llm import Reply, Sampling
from ragdistill.records import Message, Usage, digest

Policy = Callable[[Sequence[Message], Sampling], str]


class ScriptedModel:
    """Answers with `policy(messages, sampling)`; the policy must be a pure function for runs to be repeatable."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy, self._name = policy, name
        self._seen: dict[str, list[str]] = {}

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        """Answer at once."""
        prompt = _words(messages)
        known = self._seen.get(conversation, []) if conversation else []
        reused = next((i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), len(known))
        text = self._policy(messages, sampling)
        completion = text.split()
        if conversation:
            self._seen[conversation] = [*prompt, *completion]
        usage = Usage(
            prompt_tokens=len(prompt),
            completion_tokens=len(completion),
            computed_tokens=len(prompt) - min(reused, len(prompt)) + len(completion),
        )
        return Reply(text=text, usage=usage)

    async def forget(self, conversation: str) -> None:
        self._seen.pop(conversation, None)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Words of the prompt."""
        return len(_words(messages))

    def fingerprint(self) -> str:
        """Identity of the script; its code is not part of it."""
        return digest("scripted", self._name)


def _words(messages: Sequence[Message]) -> list[str]:
    return [word for m in messages for word in (f"<{m.role}>", *m.content.split())]
