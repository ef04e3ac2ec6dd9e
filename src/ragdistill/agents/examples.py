"""Few-shot prompts: an agent that shows example episodes, written in its own form, before the game it plays.

They stand in the system message, so they are part of what trimming never drops, and the first user message stays task
and hints. Only who plays shows them: training examples are rendered by the agent itself, which knows of none. Which
episodes there are, and which type a task is of, is the environment's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from ragdistill.agents import Agent, Parsed
from ragdistill.errors import ConfigError
from ragdistill.records import Message, Record, Step, digest

HEADER = "Examples of won games follow. Your own game begins after them: write one turn at a time."
OBSERVED = "Observation:"


class Example(Record, frozen=True, kw_only=True):
    """An episode that was won. Replies are written anew, in the form of the agent that shows it."""

    first_observation: str
    steps: tuple[Step, ...]


class FewShot:
    """`inner` with `count` examples of the task's type; it parses and replies as `inner` does.

    `library`: task type → its episodes, the best first; `type_of`: first observation → task type, where one that the
    library lacks stands for the library's first. Raises `ConfigError` when a type has fewer than `count` episodes.
    """

    def __init__(
        self, inner: Agent, library: Mapping[str, Sequence[Example]], type_of: Callable[[str], str], count: int
    ) -> None:
        most = min(map(len, library.values()), default=0)
        if count > most:
            raise ConfigError(f"agent.examples is {count}, but there are {most} for each task type; set it to {most}.")
        self._inner, self._type_of = inner, type_of
        self._texts = {kind: _text(inner, episodes[:count]) for kind, episodes in library.items()}
        self.name, self.states = inner.name, inner.states
        self.version = f"{inner.version}+{count}-{digest(list(self._texts.items()))[:12]}"

    def render(self, first_observation: str, hints: Sequence[str], steps: Sequence[Step]) -> list[Message]:
        system, *rest = self._inner.render(first_observation, hints, steps)
        shown = self._texts.get(self._type_of(first_observation)) or next(iter(self._texts.values()))
        return [msgspec.structs.replace(system, content=f"{system.content}\n\n{shown}"), *rest]

    def parse(self, reply: str) -> Parsed:
        return self._inner.parse(reply)

    def reply(self, thought: str, action: str, state: Mapping[str, str] | None = None) -> str:
        return self._inner.reply(thought, action, state)


def _text(agent: Agent, examples: Sequence[Example]) -> str:
    """The block of examples. What an episode's last action led to is left out: nothing is done after it."""
    blocks = [HEADER]
    for number, example in enumerate(examples, 1):
        turns = [agent.reply(s.thought, s.action, s.state) for s in example.steps]
        seen = [f"{OBSERVED} {s.observation.strip()}" for s in example.steps[:-1]]
        lines = [line for pair in zip(turns, [*seen, ""], strict=True) for line in pair if line]
        blocks.append("\n".join((f"Example {number}", example.first_observation.strip(), *lines)))
    return "\n\n".join(blocks)
