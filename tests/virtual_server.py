"""Servers of a fixed capacity, and clients that ask them on a clock that costs no time.

What a server does with a call is a function of the clock and of the calls it has, so that the benchmark's real HTTP
server does the same. Knows of the limiter only how it is used.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import statistics
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ragdistill.llm.limiter import AdaptiveLimiter

KINDS = ("queue", "refuse", "batch")
RETRY_AFTER = 0.2
_REFUSAL = 0.02
"""Seconds until a refusal is back."""


class Server:
    """`queue` computes `capacity` calls at once and lets others wait, `refuse` refuses them, `batch` is slower the more
    calls it has: with `capacity` at half its greatest throughput."""

    def __init__(self, kind: str, capacity: int, seconds: float = 1.0, noise: float = 0.3, seed: int = 0) -> None:
        """`noise`: standard deviation of the time a call takes, as a share of it."""
        self._kind, self._capacity, self._seconds, self._noise = kind, capacity, seconds, noise
        self._rng = random.Random(seed)
        self._free_at = [0.0] * capacity

    def takes(self, now: float, under_way: int) -> float | None:
        """Seconds until the answer to a call that comes now and is one of `under_way`; None: refused."""
        alone = self._seconds * max(0.2, self._rng.gauss(1, self._noise))
        if self._kind == "refuse":
            return alone if under_way <= self._capacity else None
        if self._kind == "batch":
            return alone * (1 + under_way / self._capacity)
        ends = max(now, self._free_at[0]) + alone
        heapq.heapreplace(self._free_at, ends)
        return ends - now


class FixedLimiter(AdaptiveLimiter):
    """Always the same number of calls at once."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """`most`: that number."""
        super().__init__(most, clock)
        self._level = self._limit = float(most)

    def succeeded(self, turn: object) -> None:
        """Nothing changes."""

    congested = succeeded


class VirtualLoop(asyncio.SelectorEventLoop):
    """Sleeping costs no time: the clock jumps to whatever is due next."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        selector: Any = vars(self)["_selector"]
        select = selector.select

        def jump(timeout: float | None = None):
            self._now += timeout or 0.0
            return select(0)

        selector.select = jump

    def time(self) -> float:
        return self._now


def virtual(main: Callable[[VirtualLoop], Coroutine[Any, Any, Any]]) -> Any:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.close()


@dataclass(frozen=True)
class Run:
    """What became of a run. The end, where clients run out of calls, is left out."""

    whole: float
    """Calls a second."""
    settled: float
    """The same without the first third."""
    seconds: float
    """That a call took at the server on average, without the first third."""
    refused: int
    limit: int
    """Calls at once in the end."""


def measured(ends: list[float], clients: int) -> tuple[float, float]:
    """(calls a second, the same without the first third) of calls that ended at `ends`, counted from 0."""
    start, stop = len(ends) // 3, len(ends) - clients
    return stop / ends[stop], (stop - start) / (ends[stop] - ends[start])


def simulate(
    server: Server, calls: int, clients: int, make: Callable[[int, Callable[[], float]], AdaptiveLimiter]
) -> Run:
    """`clients` ask `server`, each one call after another, as the limiter that `make` makes lets them."""

    async def main(loop: VirtualLoop) -> Run:
        limiter, left = make(clients, loop.time), iter(range(calls))
        ends, took, under_way, refused = [], [], 0, 0

        async def client() -> None:
            nonlocal under_way, refused
            for _ in left:
                answered = False
                while not answered:
                    async with limiter.slot() as turn:
                        under_way += 1
                        takes = server.takes(loop.time(), under_way)
                        if answered := takes is not None:
                            await asyncio.sleep(takes)
                            under_way -= 1
                            limiter.succeeded(turn)
                            took.append(takes)
                        else:
                            under_way -= 1
                            refused += 1
                            await asyncio.sleep(_REFUSAL)
                            limiter.congested(turn)
                            limiter.pause(RETRY_AFTER)
                ends.append(loop.time())

        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = statistics.mean(took[calls // 3 : calls - clients])
        return Run(*measured(ends, clients), seconds, refused, limiter.limit)

    return virtual(main)
