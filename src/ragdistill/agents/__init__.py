"""The `Agent` protocol: prompt rendering and action parsing as a tested pair. An agent knows no engine and no network.

`render` turns what has happened into chat messages, `parse` turns a reply into its fields, and `reply` is the
inverse of `parse`: demonstrations and stripped trajectories are written with it, so that training and inference see
the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from ragdistill.errors import ConfigError
from ragdistill.records import Message, Record, Step


class Parsed(Record, frozen=True, kw_only=True):
    """What one reply says. `action` is empty when there is none, `thought` also where the style has none (Act)."""

    thought: str
    action: str
    state: dict[str, str] = msgspec.field(default_factory=dict)
    """Label → text of what else the style has each turn state (goal, location, …), in order; empty for ReAct."""


class Agent(Protocol):
    """A prompt style."""

    name: str
    version: str
    """Changes whenever rendering or parsing changes; part of the journal's key."""
    states: bool
    """Whether each turn states goal and state too, and so takes more tokens."""

    def render(self, first_observation: str, hints: Sequence[str], steps: Sequence[Step]) -> list[Message]:
        """The whole chat so far, ready for the next reply."""
        ...

    def parse(self, reply: str) -> Parsed:
        """Read a reply; never raises, whatever the text."""
        ...

    def reply(self, thought: str, action: str, state: Mapping[str, str] | None = None) -> str:
        """The text of a turn: `parse(reply(t, a, s)) == Parsed(t, a, s)` for single-line t and what was parsed.

        A style without room for `thought` or `state` leaves it out.
        """
        ...


def make_agent(name: str) -> Agent:
    """The agent called `name`; `ConfigError` names the valid ones."""
    from ragdistill.agents.act import Act
    from ragdistill.agents.react import ReAct
    from ragdistill.agents.stateact import StateAct

    agents: dict[str, type[Agent]] = {"act": Act, "react": ReAct, "stateact": StateAct}
    if name not in agents:
        raise ConfigError(f"agent.name is {name!r}; choose one of {', '.join(sorted(agents))}.")
    return agents[name]()
