"""What `rollout_speed.py` compares with and how it measures: plain transformers as a `ChatModel`, clocks, memory.

The two baselines get exactly the prompts that the project's engines get (`ChatFormat`), the same stop tokens and all
cores; they keep no KV cache between calls. Greedy only. This module knows no task.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ragdistill.envs.pool import EnvPool, LeasedEnv
from ragdistill.errors import ConfigError
from ragdistill.llm import ChatModel, Reply, Sampling, cpu_env
from ragdistill.llm.chat_format import ChatFormat, load_tokenizer
from ragdistill.records import Message, Observation, Task, Usage, digest


class PlainModel:
    """transformers' `generate` on the whole history, every turn, one call at a time."""

    def __init__(self, model_dir: Path, dtype: str = "float32") -> None:
        cpu_env.apply()
        import torch

        from ragdistill.llm.weights import load_merged, model_fingerprint

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch: Any = torch
        self._model: Any = load_merged(model_dir, None, getattr(torch, dtype))
        self._format = ChatFormat(load_tokenizer(model_dir))
        self._fingerprint = digest("plain", model_fingerprint(model_dir), dtype)
        self._one = asyncio.Lock()

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        """Answer greedily; calls wait for each other."""
        _check_greedy(sampling)
        ids = self._format.prompt_ids(messages)
        async with self._one:
            (generated,) = await asyncio.to_thread(self.generate, [ids], [sampling.max_tokens])
        return self._reply(ids, generated)

    async def forget(self, conversation: str) -> None:
        """Nothing is kept."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Prompt length in tokens."""
        return len(self._format.prompt_ids(messages))

    def fingerprint(self) -> str:
        """Identity of weights and precision."""
        return self._fingerprint

    def generate(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        """Greedy ids of each prompt up to its stop token (kept) or limit, as one left-padded batch."""
        torch, width = self._torch, max(map(len, prompts))
        stops = sorted(self._format.stop_ids)
        padded = torch.tensor([[stops[0]] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                padded, attention_mask=mask, max_new_tokens=max(limits), do_sample=False, num_beams=1,
                repetition_penalty=1.0, eos_token_id=stops, pad_token_id=stops[0],
            )  # fmt: skip
        rows = [row[:limit] for row, limit in zip(out[:, width:].tolist(), limits, strict=True)]
        ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def _reply(self, prompt: list[int], generated: list[int]) -> Reply:
        stopped = bool(generated) and generated[-1] in self._format.stop_ids
        text = self._format.decode(generated[:-1] if stopped else generated)
        count = len(generated)
        usage = Usage(prompt_tokens=len(prompt), completion_tokens=count, computed_tokens=len(prompt) + count)
        return Reply(text=text, usage=usage, finish="stop" if stopped else "length")


class BatchedModel(PlainModel):
    """The same in batches: every conversation that runs is waited for, then all are generated at once (lock-step)."""

    def __init__(self, model_dir: Path, dtype: str = "float32") -> None:
        super().__init__(model_dir, dtype)
        self._alive: set[str] = set()
        self._waiting: list[tuple[list[int], int, asyncio.Future[list[int]]]] = []
        self._batch: asyncio.Task[None] | None = None

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        """Answer greedily, together with all others."""
        _check_greedy(sampling)
        ids = self._format.prompt_ids(messages)
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._alive.add(conversation)
        self._waiting.append((ids, sampling.max_tokens, future))
        self._start_if_complete()
        return self._reply(ids, await future)

    def expect(self, conversations: Sequence[str]) -> None:
        """Nothing is generated before all of these have asked, or are forgotten."""
        self._alive.update(conversations)

    async def forget(self, conversation: str) -> None:
        """The others need not wait for this one any more."""
        self._alive.discard(conversation)
        self._start_if_complete()

    def _start_if_complete(self) -> None:
        if self._batch is None and self._waiting and len(self._waiting) >= len(self._alive):
            self._batch = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        batch, self._waiting = self._waiting, []
        try:
            done = await asyncio.to_thread(self.generate, [b[0] for b in batch], [b[1] for b in batch])
        except Exception as e:  # noqa: BLE001 - boundary: every caller is told
            for _, _, future in batch:
                future.set_exception(e)
        else:
            for (_, _, future), generated in zip(batch, done, strict=True):
                future.set_result(generated)
        self._batch = None
        self._start_if_complete()


def _check_greedy(sampling: Sampling) -> None:
    if sampling.temperature > 0 or sampling.stop:
        raise ConfigError("The plain baselines are greedy and know no stop strings; set the temperature to 0.")


def walk(messages: Sequence[Message], _: Sampling) -> str:
    """A script that goes from receptacle to receptacle and opens each: the environment works, no model does."""
    places = re.findall(r"\b[a-z]+ \d+\b", messages[1].content) or ["nowhere 1"]
    turn = sum(m.role == "assistant" for m in messages)
    verb = "open" if turn % 2 else "go to"
    return f"Thought: I look around.\nAction: {verb} {places[turn // 2 % len(places)]}"


@dataclass
class Clock:
    """Wall seconds by what was going on: some reply being made, else some environment at work, else neither."""

    seconds: dict[str, float] = field(default_factory=lambda: {"engine": 0.0, "environment": 0.0, "elsewhere": 0.0})
    running: dict[str, int] = field(default_factory=lambda: {"engine": 0, "environment": 0})
    since: float = field(default_factory=time.perf_counter)

    def advance(self) -> None:
        """Book the time since the last change."""
        now = time.perf_counter()
        self.seconds[next((k for k, n in self.running.items() if n), "elsewhere")] += now - self.since
        self.since = now

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """One more of `what` is going on."""
        self.advance()
        self.running[what] += 1
        try:
            yield
        finally:
            self.advance()
            self.running[what] -= 1


class TimedModel:
    """A `ChatModel` that tells a clock."""

    def __init__(self, model: ChatModel, clock: Clock) -> None:
        self._model, self._clock = model, clock
        self.forget, self.count_tokens, self.fingerprint = model.forget, model.count_tokens, model.fingerprint

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:
        """As the model's."""
        with self._clock.during("engine"):
            return await self._model.chat(messages, sampling, conversation)


@dataclass
class TimedEnv:
    """A leased environment that tells a clock."""

    env: LeasedEnv
    clock: Clock

    async def reset(self, task: Task) -> Observation:
        """As the environment's."""
        with self.clock.during("environment"):
            return await self.env.reset(task)

    async def step(self, action: str) -> Observation:
        """As the environment's."""
        with self.clock.during("environment"):
            return await self.env.step(action)


@dataclass
class TimedPool:
    """A pool whose environments tell a clock."""

    pool: EnvPool
    clock: Clock

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[TimedEnv]:
        """As the pool's."""
        async with self.pool.lease() as env:
            yield TimedEnv(env, self.clock)


def start_workers(pool: EnvPool, workers: int, task: Task) -> list[asyncio.Task[None]]:
    """Start every worker and let it load `task`: leases that are held at the same time go to different workers."""
    held = asyncio.Barrier(workers)

    async def one() -> None:
        async with pool.lease() as env:
            await held.wait()
            await env.reset(task)

    return [asyncio.create_task(one()) for _ in range(workers)]


class Memory:
    """Resident memory in MiB of this process and of its children, sampled twice a second (shared pages twice).

    The children are the pool's workers, those that only finish their episodes before they are replaced among them.
    """

    def __init__(self, pool: EnvPool) -> None:
        self._pool, self._stop = pool, threading.Event()
        self.first = self.last = self.peak = (rss([os.getpid()]), 0.0)
        self._children: list[float] = []
        self._seen: set[int] = set()

    @property
    def replaced(self) -> int:
        """Workers that are not there any more."""
        return len(self._seen - set(self._pool.pids))

    @property
    def quarters(self) -> tuple[float, ...]:
        """The children's peak in each quarter of the time."""
        sizes = self._children
        return tuple(max(sizes[i * len(sizes) // 4 : (i + 1) * len(sizes) // 4] or sizes[-1:]) for i in range(4))

    def __enter__(self) -> Memory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._sample()
        self.first = self.last
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._sample()

    def _sample(self) -> None:
        self._seen |= set(self._pool.pids)
        self._children.append(rss([p.pid for p in psutil.Process().children(recursive=True)]))
        self.last = rss([os.getpid()]), self._children[-1]
        self.peak = max(self.peak, self.last, key=sum)


def rss(pids: Sequence[int]) -> float:
    """Sum of the resident memory of `pids`, MiB; one that has ended counts as 0."""
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, IndexError):
            continue
    return total / 2**20
