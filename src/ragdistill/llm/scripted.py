"""A `ChatModel` that answers from a Python function: for tests, and for running the whole pipeline without weights.

It counts white-space separated tokens, with prefix reuse inside a conversation as the local engine has it. This
module knows no weights, no network and no task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ragdistill.llm import Engine, Reply, Sampling
from ragdistill.llm.slots import common_prefix
from ragdistill.records import Message, Usage, digest

Policy = Callable[[Sequence[Message], Sampling], str]
"""Must be a pure function: the reply to the same messages and sampling is always the same."""


class ScriptedModel:
    """Answers with `policy(messages, sampling)`, cut to `max_tokens` words and at the first stop string."""

    def __init__(self, policy: Policy, name: str) -> None:
        """`name` is the model's identity: give another name to another behaviour."""
        self._policy, self._name = policy, name
        self.engine = Engine(name="a script, no model")
        self._kept: dict[str, list[str]] = {}

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        """Answer at once."""
        prompt = _tokens(messages)
        text = self._policy(messages, sampling)
        cut = min((at for at in map(text.find, sampling.stop) if at >= 0), default=len(text))
        words = text[:cut].split()
        short = len(words) > sampling.max_tokens
        text = " ".join(words[: sampling.max_tokens]) if short else text[:cut]
        completion = min(len(words), sampling.max_tokens) + (not short)  # the end of the turn is a token too
        reused = min(common_prefix(self._kept.get(conversation, []), prompt), len(prompt) - 1)
        if conversation:
            self._kept[conversation] = prompt + text.split()
        usage = Usage(
            prompt_tokens=len(prompt),
            completion_tokens=completion,
            computed_tokens=len(prompt) - reused + completion,
        )
        return Reply(text=text, usage=usage, finish="length" if short else "stop")

    async def forget(self, conversation: str) -> None:
        """Forget what was counted for `conversation`."""
        self._kept.pop(conversation, None)

    def close(self) -> None:
        """Nothing is held."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Words of the prompt, a role counting as one."""
        return len(_tokens(messages))

    def fingerprint(self) -> str:
        """Identity of the script: its name."""
        return digest("scripted", self._name)


def _tokens(messages: Sequence[Message]) -> list[str]:
    """Words, each turn opened by its role; the generation prompt is the open assistant turn."""
    words = [word for m in messages for word in (f"<{m.role}>", *m.content.split())]
    return [*words, "<assistant>"]
