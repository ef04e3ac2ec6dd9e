"""Many environments in a few worker processes, for one asyncio loop.

    pool = EnvPool(factory, workers=2, slots=16)
    async with pool.lease() as env:
        first = await env.reset(task)
        then = await env.step("look")
    await pool.close()

A worker's environments live in its `Host`: a process of this machine, or of another (`ray_pool`). A slot keeps its
environment and `reset`s it. A worker that dies or hangs fails its own leases with `EnvironmentFault` and is replaced.
The pool knows no particular environment, no model and no task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from ragdistill import errors
from ragdistill.envs.hosts import Factory, Host, Opener, open_process
from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.records import Observation, Task


class _Worker:
    """A host's leases. Its single thread queues the requests, so a cancelled caller cannot mix answers."""

    def __init__(self, host: Host, timeout: float) -> None:
        self.host, self._timeout = host, timeout
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="env")
        self.leased: set[int] = set()
        self.resets = 0
        self.busy_seconds = 0.0
        self.fault = ""

    async def ask(self, slot: int, verb: str, argument: Task | str) -> Observation:
        """Send a request and wait for its answer; raises what the environment raised, or `EnvironmentFault`."""
        self.resets += verb == "reset"
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, slot, verb, argument)

    def _exchange(self, slot: int, verb: str, argument: Task | str) -> Observation:
        answer = self._roundtrip(slot, verb, argument)
        if isinstance(answer, Observation):
            return answer
        name, text = answer
        raise getattr(errors, name, EnvironmentFault)(text)

    def _roundtrip(self, slot: int, verb: str, argument: Task | str) -> Any:
        if self.fault:
            raise EnvironmentFault(self.fault)
        try:
            answer, seconds = self.host.exchange(slot, verb, argument, self._timeout)
        except TimeoutError as e:
            reason = f"An environment worker gave no answer within {self._timeout:g} s; raise env.step_timeout."
            self.fail(str(e) or reason)
            raise EnvironmentFault(self.fault) from None
        except (EOFError, OSError) as e:
            self.fail(f"An environment worker died ({str(e) or type(e).__name__}); the episode will be played again.")
            raise EnvironmentFault(self.fault) from None
        self.busy_seconds += seconds
        return answer

    def fail(self, reason: str) -> None:
        """Mark as broken and kill the host; pending and later requests raise `EnvironmentFault`."""
        self.fault = reason
        self.host.kill()

    def stop(self) -> None:
        """End the host, politely if it is idle and healthy, and reap it. Blocks for a moment."""
        if not self.fault and not self.leased:
            self.host.quit()
        self.fault = self.fault or "The environment pool is closed."
        self.host.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.host.close()


class LeasedEnv:
    """An environment slot of a worker, held by one episode."""

    def __init__(self, worker: _Worker, slot: int) -> None:
        self._worker, self._slot = worker, slot

    async def reset(self, task: Task) -> Observation:
        """Like `Env.reset`; `EnvironmentFault` when the worker died or hung."""
        return await self._worker.ask(self._slot, "reset", task)

    async def step(self, action: str) -> Observation:
        """Like `Env.step`; `EnvironmentFault` when the worker died or hung."""
        return await self._worker.ask(self._slot, "step", action)


class EnvPool:
    """`workers` processes with up to `slots` environments each; `opener` may have them run on other machines.

    A worker is replaced after `recycle_after` resets (engines leak); it finishes its running leases first. `timeout`
    (seconds) bounds one reset or step, the first one with the worker's imports included. Raises `ConfigError` on
    sizes below 1. Workers start with the first leases. Where `opener` finds no room for one, the others hold more.
    """

    def __init__(
        self,
        factory: Factory,
        workers: int = 2,
        slots: int = 16,
        recycle_after: int = 200,
        timeout: float = 60.0,
        opener: Opener = open_process,
    ) -> None:
        if min(workers, slots, recycle_after) < 1 or timeout <= 0:
            raise ConfigError("workers, slots, recycle_after and timeout of an environment pool must be positive.")
        self._factory, self._opener, self._timeout, self._recycle_after = factory, opener, timeout, recycle_after
        self._workers: list[_Worker | None] = [None] * workers
        self._retired: list[_Worker] = []
        self._free = asyncio.Semaphore(workers * slots)
        self._past_seconds = 0.0

    @property
    def busy_seconds(self) -> float:
        """CPU seconds that all workers, past ones included, spent on requests."""
        return self._past_seconds + sum(w.busy_seconds for w in [*self._workers, *self._retired] if w)

    @property
    def pids(self) -> list[int]:
        """Process ids of the live workers on this machine."""
        return [w.host.pid for w in self._workers if w is not None and not w.fault and w.host.pid]

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[LeasedEnv]:
        """Wait for a free slot and hold it; the least loaded worker gives it."""
        async with self._free:
            worker = await self._pick()
            slot = next(i for i in range(len(worker.leased) + 1) if i not in worker.leased)
            worker.leased.add(slot)
            try:
                yield LeasedEnv(worker, slot)
            finally:
                worker.leased.discard(slot)
                await self._bury()

    async def close(self) -> None:
        """End all workers; running requests raise `EnvironmentFault`. May be called twice."""
        self._retired += [w for w in self._workers if w is not None]
        self._workers = [None] * len(self._workers)
        await self._bury(everything=True)

    async def _pick(self) -> _Worker:
        """Least loaded healthy worker; starts, replaces and retires workers on the way."""
        for i, worker in enumerate(self._workers):
            if worker is not None and (worker.fault or not worker.host.alive() or worker.resets >= self._recycle_after):
                self._retired.append(worker)
                self._workers[i] = None
            if self._workers[i] is None:
                host = self._opener(self._factory, [w.host for w in self._workers if w is not None])
                self._workers[i] = None if host is None else _Worker(host, self._timeout)
        await self._bury()
        open_ones = [w for w in self._workers if w is not None]
        if not open_ones:
            raise EnvironmentFault("No environment worker is left; the pool was closed, or its machines are gone.")
        return min(open_ones, key=lambda w: len(w.leased))

    async def _bury(self, everything: bool = False) -> None:
        """Stop the retired workers that nobody holds (or all of them) without blocking the loop."""
        ended = [w for w in self._retired if everything or not w.leased]
        self._retired = [w for w in self._retired if w not in ended]
        for worker in ended:
            await asyncio.shield(asyncio.to_thread(worker.stop))
            self._past_seconds += worker.busy_seconds
