"""A measurement of `rollout_speed.py`, and how it answers turns of games that were played before. Plays nothing."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plain_models import BatchedModel, rss
from rollout_tables import Measured

from ragdistill.llm import ChatModel, Sampling
from ragdistill.records import Task, Trajectory
from ragdistill.rollout import Setting, fit


@dataclass(frozen=True)
class Job:
    """One measurement."""

    mode: str
    model: Path | None
    tasks: tuple[Task, ...]
    episodes: int
    """More than tasks: the tasks are played again."""
    max_steps: int
    concurrency: int
    recycle: int
    """Resets before an environment worker is replaced."""
    histories: tuple[Trajectory, ...] = ()
    """Played in float32; the mode's next action on each of their histories is compared."""
    turns: int = 0
    """If not 0, nothing is played: so many turns (batches of them in mode b) of the histories are answered."""


async def agree(model: ChatModel, setting: Setting, t: Trajectory) -> tuple[int, int]:
    """On how many of the histories of `t` that led to an action the model plays the same one, and of how many."""
    acted = [i for i, step in enumerate(t.steps) if step.action]
    equal = 0
    for i in acted:
        equal += await again(model, setting, t, i, t.id)
    await model.forget(t.id)
    return equal, len(acted)


async def again(model: ChatModel, setting: Setting, t: Trajectory, i: int, conversation: str) -> bool:
    """Whether the model, on the history before turn `i` of `t`, plays the action that was played."""
    agent, limits = setting.agent, setting.limits
    budget = limits.context_tokens - limits.reply_tokens
    chat = fit(agent.render(t.first_observation, t.hints, t.steps[:i]), budget, model.count_tokens)
    if chat is None:
        return False
    reply = await model.chat(chat, Sampling(max_tokens=limits.reply_tokens), conversation)
    return agent.parse(reply.text).action == t.steps[i].action


async def alone(model: ChatModel, setting: Setting, job: Job) -> Measured:
    """Answer turns drawn evenly from all of the histories, one by one; what all would take is estimated from them."""
    every = [(t, i) for t in job.histories for i in range(len(t.steps))]
    chosen, seconds, equal = random.Random(0).sample(every, min(job.turns, len(every))), [], []
    for t, i in chosen:
        started = time.perf_counter()
        equal.append(await again(model, setting, t, i, ""))
        seconds.append(time.perf_counter() - started)
    return _drawn(job, sum(seconds) / len(seconds) * len(every), equal, seconds)


async def together(model: BatchedModel, setting: Setting, job: Job) -> Measured:
    """Answer the turns of the same number of all histories in one batch, for numbers spread evenly; then as `alone`."""
    longest, seconds, equal = max(len(t.steps) for t in job.histories), [], []
    count = min(job.turns, longest)
    for i in [int((k + 0.5) * longest / count) for k in range(count)]:
        there = [t for t in job.histories if len(t.steps) > i]
        batch = there[: job.concurrency]
        model.expect([t.id for t in batch])
        started = time.perf_counter()
        equal += await asyncio.gather(*(again(model, setting, t, i, t.id) for t in batch))
        seconds.append((time.perf_counter() - started) * len(there) / len(batch))
        for t in batch:
            await model.forget(t.id)
    return _drawn(job, sum(seconds) / count * longest, equal, seconds)


def _drawn(job: Job, whole: float, equal: Sequence[bool], seconds: Sequence[float]) -> Measured:
    """`seconds` of what was drawn, from which playing all takes `whole`."""
    size = rss([os.getpid()]), 0.0
    return Measured(
        job.histories, whole, {"engine": 1.0, "environment": 0.0, "elsewhere": 0.0}, 0.0, (size, size, size),
        tuple((int(e), 1) for e in equal), alone=tuple(seconds),
    )  # fmt: skip
