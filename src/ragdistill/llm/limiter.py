"""How many calls are under way at once: found by trying, without a setting.

More calls at once help as long as throughput grows with them, that is as long as latency grows slower than their
number. The limiter doubles while that holds, then tries half as many more (or a fifth fewer) now and then and keeps
what pays. A refusal (429, 5xx, time-out) takes it back: to the last good number during a trial, to 0.8 of it otherwise.
The idea is TCP Vegas' and gradient limiters'; throughput is compared instead of latency with its minimum, because a
model server's latency grows with its batch long before its throughput ends. Knows no HTTP and no model; lives in one
event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

START = 8
"""Calls at once in the beginning: from a server that serves one at a time they come back within the usual deadline."""
PAYS = 0.1
"""Least elasticity d ln(throughput) / d ln(calls) for which more calls at once are worth it."""
PAYS_DOUBLE = 0.2
"""The same while doubling, where short windows measure coarsely."""
CUT = 0.8
FEWER = 0.8
MORE = 1.5
MOST_PATIENCE = 32
"""Windows between trials once trials keep failing."""
BUSY = 0.8
"""Share of a window's calls that must have left others waiting; with less demand a window measures the demand."""


@dataclass(frozen=True)
class Turn:
    """A place that a call was given."""

    number: int
    at: float


class AdaptiveLimiter:
    """`async with slot() as turn:` waits for a place; `succeeded` and `congested` say how the call went."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`most`: calls at once that are never exceeded."""
        self._most, self._clock = most, clock
        self._level = float(min(START, most))
        """Calls at once that have proved good."""
        self._before = 0.0
        """The level it was raised from; a refusal soon after goes back there. 0 when that was used."""
        self._limit = self._level
        """Calls at once now: the level, or a trial of another number."""
        self._waiting: deque[asyncio.Future[Turn]] = deque()
        self._resume_at = 0.0
        self._in_flight = self._turns = self.peak = 0
        self._doubling, self._step, self._upwards = True, MORE, True
        self._patience, self._rest = 1, 0
        self._base: float | None = None
        """Throughput at the level, calls per second."""
        self._new_window()

    @property
    def limit(self) -> int:
        """Calls at once that are allowed now."""
        return max(1, int(self._limit))

    @property
    def resumes_in(self) -> float:
        """Seconds until calls may start again; 0 when they may."""
        return max(0.0, self._resume_at - self._clock())

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Turn]:
        """Wait for a place, in the order of asking."""
        if self._waiting or not self._free():
            mine: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
            self._waiting.append(mine)
            if self.resumes_in:
                self._wake_later()
            try:
                turn = await mine
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():
                    self._leave()
                raise
        else:
            turn = self._enter()
        try:
            yield turn
        finally:
            self._leave()

    def succeeded(self, turn: Turn) -> None:
        """The call was answered."""
        if turn.number <= self._since:
            return  # it ran under another limit
        self._answered += 1
        late = self._answered - (0 if self._doubling else self.limit)  # the first ones found shorter queues
        if late <= 0:
            return
        self._latency += self._clock() - turn.at
        self._busy += bool(self._waiting)
        if late >= max(8, self.limit * (1 if self._doubling else 2)):
            if self._busy >= BUSY * late and self._latency > 0:
                self._judge(self.limit * late / self._latency)  # Little's law: less noise than counting answers
            self._new_window()

    def congested(self, turn: Turn) -> None:
        """The call was refused, failed on the server or was not answered in time."""
        if turn.number <= self._since:
            return  # one burst of refusals is one sign
        if self._limit > self._level:
            self._step = self._step if self._doubling else 1 + (self._step - 1) / 2
        else:
            self._level, self._patience, self._upwards = max(1.0, self._level * CUT, self._before), 1, True
            self._before = 0.0
        self._base = None
        self._settle()
        self._new_window()

    def pause(self, seconds: float) -> None:
        """Start no call for so long: the server asked for it (`Retry-After`)."""
        self._resume_at = max(self._resume_at, self._clock() + seconds)
        self._wake_later()

    def _judge(self, throughput: float) -> None:
        """A window has ended: keep or take back a trial, or begin one."""
        if self._limit == self._level or self._base is None:
            self._base = throughput
            self._rest -= 1
            if self._rest < 0:
                self._try()
            return
        elasticity = math.log(throughput / self._base) / math.log(self._limit / self._level)
        upwards = self._limit > self._level
        if elasticity >= (PAYS_DOUBLE if self._doubling else PAYS) if upwards else elasticity <= 0:
            self._before = self._level if upwards else 0.0
            self._level, self._base, self._patience = self._limit, throughput, 1
            self._try()
        else:
            self._upwards = not upwards
            self._settle()

    def _try(self) -> None:
        if self._doubling:
            wanted = self._level * 2
        elif self._upwards:
            wanted = max(self._level * self._step, self._level + 1)
        else:
            wanted = min(self._level * FEWER, self._level - 1)
        self._limit = min(max(float(int(wanted)), 1.0), float(self._most))
        if self._limit == self._level:  # at an end of the range
            self._doubling = False
            self._upwards = not self._upwards

    def _settle(self) -> None:
        """Back to the level, for a while that doubles each time."""
        self._limit = self._level
        if not self._doubling:
            self._rest = self._patience
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        self._doubling = False

    def _new_window(self) -> None:
        self._since, self._answered, self._busy, self._latency = self._turns, 0, 0, 0.0
        self._wake()

    def _free(self) -> bool:
        return self._in_flight < self.limit and not self.resumes_in

    def _enter(self) -> Turn:
        self._in_flight += 1
        self._turns += 1
        self.peak = max(self.peak, self._in_flight)
        return Turn(self._turns, self._clock())

    def _leave(self) -> None:
        self._in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._free():
            first = self._waiting.popleft()
            if not first.done():
                first.set_result(self._enter())

    def _wake_later(self) -> None:
        asyncio.get_running_loop().call_later(self.resumes_in + 1e-3, self._wake)
