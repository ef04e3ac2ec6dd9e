"""What `null` in params.yaml stands for: the environment's, or the agent's, own value.

So `env.name` and `agent.name` alone choose a cell. Whatever identifies an episode or an adapter is made of the settled
values, so saying null and saying the value are the same. Knows no environment and no agent by name, but for `FIRST`.
"""

from __future__ import annotations

import msgspec

from ragdistill.agents import make_agent
from ragdistill.envs import defaults_of, make_domain
from ragdistill.params import Params

FIRST = ("alfworld", "react")
"""The cell whose students are registered under a name without it; registries began with it."""


def max_steps(p: Params) -> int:
    """`env.max_steps`, or the environment's own."""
    return p.env.max_steps or defaults_of(make_domain(p.env)).max_steps


def attempts(p: Params) -> int:
    """`rollouts.attempts`, or the environment's own."""
    return p.rollouts.attempts or defaults_of(make_domain(p.env)).attempts


def reply_tokens(p: Params) -> int:
    """`agent.max_reply_tokens`, or what the environment grants a turn of this style."""
    if p.agent.max_reply_tokens:
        return p.agent.max_reply_tokens
    own = defaults_of(make_domain(p.env))
    return own.stated_reply_tokens if make_agent(p.agent.name).states else own.reply_tokens


def primary(p: Params) -> tuple[str, ...]:
    """`evaluate.primary`, or the environment's own; empty means all types."""
    return defaults_of(make_domain(p.env)).primary if p.evaluate.primary is None else p.evaluate.primary


def student_name(p: Params) -> str:
    """`track.registered_model`, or a name of its own for each environment and agent."""
    cell = (p.env.name, p.agent.name)
    return p.track.registered_model or "-".join(("ragdistill", *(("student",) if cell == FIRST else cell)))


def settle(p: Params) -> Params:
    """`p` without a null that stands for one of these values."""
    change = msgspec.structs.replace
    return change(
        p,
        env=change(p.env, max_steps=max_steps(p)),
        agent=change(p.agent, max_reply_tokens=reply_tokens(p)),
        rollouts=change(p.rollouts, attempts=attempts(p)),
        evaluate=change(p.evaluate, primary=primary(p)),
        track=change(p.track, registered_model=student_name(p)),
    )
