"""Env × Agent × ChatModel → Trajectory, many episodes at once; the only event loop.

A bad episode is data: it is recorded with its stop reason. An infrastructure fault is recorded as `infra_error`, is
never journaled (the next run plays it again) and is never the agent's failure. Seeds derive from (run, task, attempt,
turn), never from order, so results do not depend on concurrency where the model's arithmetic does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Protocol

import msgspec

from ragdistill.agents import Agent
from ragdistill.errors import EnvironmentFault, designed
from ragdistill.journal import Journal
from ragdistill.llm import ChatModel, Sampling, context_limit
from ragdistill.params import AgentParams
from ragdistill.records import (
    Hint,
    Message,
    Observation,
    Step,
    StopReason,
    Task,
    Trajectory,
    Usage,
    digest,
    seed_of,
    utf8,
)

LOGIC_VERSION = "rollout-1"
"""Changes whenever this module's decisions change (trimming, loops, stops); part of the journal's key."""

INFRA_RETRIES = 2
"""Fresh episodes after an infrastructure fault, before it is recorded as `infra_error`."""


class AsyncEnv(Protocol):
    """A leased environment."""

    async def reset(self, task: Task) -> Observation: ...
    async def step(self, action: str) -> Observation: ...


class Pool(Protocol):
    """Where environments are leased."""

    def lease(self) -> AbstractAsyncContextManager[AsyncEnv]: ...


Retrieve = Callable[[str, str, int], Sequence[Hint] | Awaitable[tuple[Sequence[Hint], Usage]]]
"""(bucket, goal, seed) → hints, called once an episode, at its start; a model that chooses is awaited and costs."""


@dataclass(frozen=True)
class Setting:
    """Everything but the task and the attempt that decides an episode."""

    policy: str
    run: str
    """Name of the random stream; two policies with the same run, task and attempt share their seeds."""
    agent: Agent
    limits: AgentParams
    max_steps: int
    temperature: float
    environment: str
    """Environment fingerprint."""
    model: str
    """Model fingerprint."""
    retrieve: Retrieve | None = None
    hints_key: str = ""
    """Identity of the bank and the retrieval; part of the journal's key."""
    record_admissible: bool = False

    def key(self, task: Task, attempt: int) -> str:
        """Journal key: prompt, sampling, model, environment and parser version; not the policy's name."""
        limits = msgspec.structs.replace(self.limits, examples=msgspec.UNSET)  # those shown stand in agent.version
        return digest(
            LOGIC_VERSION, self.run, self.agent.version, limits, self.max_steps, self.temperature,
            self.environment, self.model, self.hints_key, self.record_admissible, task.id, task.sha256, attempt,
        )  # fmt: skip


@dataclass
class Progress:
    """Live counts, read by a display. All fields are totals since the start of the call."""

    total: int
    done: int = 0
    replayed: int = 0
    """Of `done`: taken from the journal."""
    success: int = 0
    infra: int = 0
    completion_tokens: int = 0
    """Generated in this call (journaled episodes excluded)."""
    started: float = field(default_factory=time.monotonic)

    def add(self, t: Trajectory, replayed: bool) -> None:
        self.done += 1
        self.replayed += replayed
        self.success += t.success
        self.infra += t.stop is StopReason.INFRA_ERROR
        self.completion_tokens += 0 if replayed else t.usage.completion_tokens


async def play_all(
    jobs: Iterable[tuple[Task, int]],
    setting: Setting,
    model: ChatModel,
    pool: Pool,
    journal: Journal[Trajectory],
    concurrency: int,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> list[Trajectory]:
    """Play every (task, attempt); trajectories come back in the order of `jobs`.

    A designed error other than `EnvironmentFault` (a missing game, a wrong setting) stops all and is raised as itself.
    """
    todo = list(jobs)
    progress = Progress(total=len(todo))
    gate = asyncio.Semaphore(concurrency)

    async def one(task: Task, attempt: int) -> Trajectory:
        key = setting.key(task, attempt)
        found = journal.get(key)
        if found is None:
            async with gate:
                found = await _play_with_retries(task, attempt, key, setting, model, pool)
            if found.stop is not StopReason.INFRA_ERROR:
                journal.put(key, found)
            progress.add(found, replayed=False)
        else:
            found = _rename(found, setting.policy)
            progress.add(found, replayed=True)
        on_progress(progress)
        return found

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(t, a)) for t, a in todo]
    except ExceptionGroup as failed:
        if error := designed(failed):
            raise error from None
        raise
    return [t.result() for t in tasks]


def _rename(t: Trajectory, policy: str) -> Trajectory:
    return t if t.policy == policy else msgspec.structs.replace(t, policy=policy)


async def _play_with_retries(
    task: Task, attempt: int, key: str, setting: Setting, model: ChatModel, pool: Pool
) -> Trajectory:
    again = 0
    while True:
        episode = Episode(task, attempt, key, setting, conversation=f"{key}/{again}")
        try:
            async with pool.lease() as env:
                await episode.run(env, model)
        except EnvironmentFault as e:
            episode.stop, episode.error = StopReason.INFRA_ERROR, str(e)
        finally:
            await model.forget(episode.conversation)
        if episode.stop is not StopReason.INFRA_ERROR or again == INFRA_RETRIES:
            return episode.trajectory()
        again += 1


class Episode:
    """One episode in progress."""

    def __init__(self, task: Task, attempt: int, key: str, setting: Setting, conversation: str) -> None:
        self.task, self.attempt, self.key, self.setting, self.conversation = task, attempt, key, setting, conversation
        self.seed = seed_of(setting.run, task.id, attempt)
        self.first = Observation(text="")
        self.hints: Sequence[Hint] = ()
        self.steps: list[Step] = []
        self.usage = Usage()
        self.reward, self.parts = 0.0, self.first.parts
        self.stop = StopReason.INFRA_ERROR
        self.error = ""
        self.done = False
        self.started = time.monotonic()

    async def run(self, env: AsyncEnv, model: ChatModel) -> None:
        """Play to the end; sets `stop`."""
        s = self.setting
        self.first = observation = _writable(await env.reset(self.task))
        if s.retrieve:
            found = s.retrieve(observation.bucket, observation.goal, self.seed)
            self.hints, self.usage = await found if isawaitable(found) else (found, self.usage)
        while True:
            budget = min(s.limits.context_tokens, context_limit(model)) - s.limits.reply_tokens
            chat = fit(self._chat(), budget, model.count_tokens)
            if chat is None:
                self.stop = StopReason.CONTEXT_FULL
                return
            sampling = Sampling(
                temperature=s.temperature,
                max_tokens=s.limits.reply_tokens,
                seed=seed_of(self.seed, len(self.steps)),
            )
            reply = await model.chat(chat, sampling, self.conversation)
            self.usage += reply.usage
            if reply.finish == "context":
                self.stop = StopReason.CONTEXT_FULL
                return
            if reply.finish == "error":
                self.stop, self.error = StopReason.BAD_REPLY, utf8(reply.text)
                return
            await self._act(env, utf8(reply.text))
            if stop := self._stop_reason():
                self.stop = stop
                return

    def _chat(self) -> list[Message]:
        return self.setting.agent.render(self.first.text, [h.text for h in self.hints], self.steps)

    async def _act(self, env: AsyncEnv, text: str) -> None:
        parsed = self.setting.agent.parse(text)
        if parsed.action:
            observation = _writable(await env.step(parsed.action))
        else:
            observation = Observation(text=NO_ACTION_TEXT, valid=False, reward=self.reward, parts=self.parts)
        self.done, self.reward, self.parts = observation.done, observation.reward, observation.parts
        self.steps.append(
            Step(
                reply=text, thought=parsed.thought, action=parsed.action, observation=observation.text,
                valid=observation.valid, reward=observation.reward, state=parsed.state,
                admissible=observation.admissible if self.setting.record_admissible else (),
            )
        )  # fmt: skip

    def _stop_reason(self) -> StopReason | None:
        limits = self.setting.limits
        if self.done:
            return StopReason.SUCCESS if self.reward >= 1.0 else StopReason.FAILURE
        if len(self.steps) >= self.setting.max_steps:
            return StopReason.MAX_STEPS
        silent = [not s.action for s in self.steps[-limits.no_action_limit :]]
        if len(silent) == limits.no_action_limit and all(silent):
            return StopReason.NO_ACTION
        return StopReason.LOOP if is_loop(self.steps, limits.loop_limit) else None

    def trajectory(self) -> Trajectory:
        """The record of what happened so far."""
        s = self.setting
        return Trajectory(
            id=self.key, task_id=self.task.id, policy=s.policy, agent=s.agent.name, attempt=self.attempt,
            seed=self.seed, goal=self.first.goal, bucket=self.first.bucket, group=self.task.group,
            kind=self.task.kind, hints=tuple(h.text for h in self.hints), hint_ids=tuple(h.id for h in self.hints),
            first_observation=self.first.text, steps=tuple(self.steps), stop=self.stop, reward=self.reward,
            usage=self.usage, seconds=round(time.monotonic() - self.started, 3), model=s.model,
            environment=s.environment, error=self.error, parts=self.parts,
        )  # fmt: skip


def _writable(seen: Observation) -> Observation:
    text, goal = utf8(seen.text), utf8(seen.goal)
    return seen if (text, goal) == (seen.text, seen.goal) else msgspec.structs.replace(seen, text=text, goal=goal)


NO_ACTION_TEXT = "No action found. Write one line that begins with 'Action:'."
_DROP = 8
"""Turns are dropped in blocks, so that the kept prefix stays the same for several turns and its KV cache is reused."""


def fit(chat: list[Message], budget: int, count: Callable[[Sequence[Message]], int]) -> list[Message] | None:
    """Drop the oldest turns, in blocks, until `chat` has at most `budget` tokens.

    System text, task and hints (everything before the first reply) and the newest observation are never dropped;
    None when they (with the reply that led to it) alone are too long.
    """
    head = next((i for i, m in enumerate(chat) if m.role == "assistant"), len(chat))
    older = max((len(chat) - head) // 2 - 1, 0)
    dropped = 0
    while count(fitted := chat[:head] + chat[head + 2 * dropped :]) > budget:
        if dropped == older:
            return None
        dropped = min(dropped + _DROP, older)
    return fitted


def is_loop(steps: Sequence[Step], limit: int) -> bool:
    """The last steps are `limit` repeats of one cycle of at most four (action, observation) pairs."""
    pairs = [(s.action, s.observation) for s in steps[-4 * limit :]]
    return any(
        len(pairs) >= period * limit
        and all(pairs[-1 - i] == pairs[-1 - i - period] for i in range(period * (limit - 1)))
        for period in range(1, 5)
    )
