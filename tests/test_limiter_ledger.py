"""The number of calls at once follows the server, and the account is right over kills and processes."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ragdistill.errors import BudgetError, StorageError
from ragdistill.llm.ledger import Ledger
from ragdistill.llm.limiter import CUT, START, AdaptiveLimiter
from ragdistill.params import PriceParams, convert_params
from ragdistill.records import Usage
from ragdistill.stages.spending import collect, ledger_file
from tests.test_params import changed
from tests.virtual_server import FixedLimiter, Server, VirtualLoop, simulate, virtual

PRICES = PriceParams(prompt=1.0, cached=0.5, completion=2.0)


def throughput(capacity: int, *, refuses: bool) -> tuple[float, int]:
    """(share of `capacity` calls a second that were answered once settled, the limit in the end)."""
    run = simulate(Server("refuse" if refuses else "queue", capacity), 2500, 64, AdaptiveLimiter)
    return run.settled / capacity, run.limit


@pytest.mark.parametrize("capacity", [1, 3, 20, 40])
def test_a_queueing_server_is_kept_busy(capacity: int) -> None:
    share, _ = throughput(capacity, refuses=False)
    assert share > 0.9


@pytest.mark.parametrize("capacity", [2, 5, 20, 40])
def test_a_refusing_server_is_kept_busy_and_its_capacity_is_found(capacity: int) -> None:
    share, limit = throughput(capacity, refuses=True)
    assert share > 0.85
    assert 0.7 * capacity <= limit <= 1.3 * capacity + 1


def fixed(number: int) -> Callable[..., FixedLimiter]:
    return lambda _, clock: FixedLimiter(number, clock)


@pytest.mark.parametrize(
    ("kind", "capacity", "best", "least"), [("queue", 48, 96, 0.8), ("refuse", 48, 48, 0.75), ("batch", 16, 96, 0.75)]
)
def test_a_short_run_is_not_lost_to_a_slow_start(kind: str, capacity: int, best: int, least: float) -> None:
    """`least` is below the bar of 0.9 (docs/measured.md): it keeps a slower start out."""

    def whole(make: Callable[..., AdaptiveLimiter]) -> float:
        return statistics.mean(simulate(Server(kind, capacity, seed=seed), 800, 96, make).whole for seed in range(5))

    assert whole(AdaptiveLimiter) > least * whole(fixed(best))


@pytest.mark.parametrize("capacity", [8, 16])
def test_a_queueing_server_is_not_flooded(capacity: int) -> None:
    runs = [simulate(Server("queue", capacity, seed=seed), 1500, 96, AdaptiveLimiter) for seed in range(5)]
    flooded = simulate(Server("queue", capacity), 1500, 96, fixed(96))
    assert flooded.whole > 0.95 * capacity, "throughput alone does not show it"
    assert flooded.seconds > 5
    assert statistics.mean(run.seconds for run in runs) < 2.5


def test_refusals_take_the_limit_down_to_one_and_a_burst_counts_once() -> None:
    async def main(loop: VirtualLoop) -> list[int]:
        limiter, seen = AdaptiveLimiter(64, loop.time), []

        async def refused() -> None:
            async with limiter.slot() as turn:
                await asyncio.sleep(1)
                limiter.congested(turn)

        for _ in range(12):
            await asyncio.gather(*(refused() for _ in range(limiter.limit)))
            seen.append(limiter.limit)
        return seen

    limits = virtual(main)
    assert limits[0] == int(CUT * START) and limits[-1] == 1
    assert limits == sorted(limits, reverse=True)


def test_little_demand_raises_nothing() -> None:
    async def main(loop: VirtualLoop) -> int:
        limiter = AdaptiveLimiter(64, loop.time)
        for _ in range(200):
            async with limiter.slot() as turn:
                await asyncio.sleep(1)
                limiter.succeeded(turn)
        return limiter.limit

    assert virtual(main) == START


def test_a_cancelled_waiter_takes_no_place_and_order_is_kept() -> None:
    async def main(loop: VirtualLoop) -> list[int]:
        limiter, served = AdaptiveLimiter(1, loop.time), []

        async def one(i: int) -> None:
            async with limiter.slot():
                served.append(i)
                await asyncio.sleep(1)

        tasks = [loop.create_task(one(i)) for i in range(6)]
        await asyncio.sleep(0.5)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limiter.peak == 1
        return served

    assert virtual(main) == [0, 1, 3, 4, 5]


def ledger(path: Path, budget: float | None = None, stage: str = "rollouts", currency: str = "EUR") -> Ledger:
    return Ledger(path, stage, "m", PRICES, budget, currency)


def test_what_was_spent_outlives_kills_and_reruns_and_is_parted_by_stage_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path))
    for stage, model in (("rollouts", "m"), ("rollouts", "ranker"), ("rollouts", "m"), ("teach@hints", "m")):
        book = Ledger(ledger_file(), stage, model, PRICES, None, "EUR")
        ticket, refused, lost = (book.reserve(1_000_000, 0) for _ in range(3))
        assert ticket and refused and lost, "the last is a call that a kill broke off"
        book.settle(ticket, USED)
        book.fail(refused, unsure=False)
    with ledger_file().open("ab") as file:
        file.write(b'{"id":"torn","reser')
    served = convert_params(changed("model.teacher", "endpoint"))
    twice, ranker, teach = collect(served)
    assert [(s.stage, s.model) for s in (ranker, teach)] == [("rollouts", "ranker"), ("teach@hints", "m")]
    assert (twice.stage, twice.model, twice.currency) == ("rollouts", "m", "EUR")
    assert (twice.paid_calls, twice.failed_attempts) == (2, 4)
    assert (twice.prompt_tokens, twice.cached_tokens, twice.completion_tokens) == (2_000_000, 1_200_000, 1_000_000)
    assert (twice.money, twice.unsure_money) == (pytest.approx(2 * 1.7 + 2 * 1.0), pytest.approx(2 * 1.0))
    assert sum(s.money for s in collect(served)) == pytest.approx(ledger(ledger_file()).spent)
    assert collect(convert_params(changed("model.teacher", None))) == [], "another experiment's, where all is local"


def test_where_nothing_was_ever_paid_there_is_nothing_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path))
    assert collect(convert_params(changed("model.teacher", "endpoint"))) == [] == list(tmp_path.iterdir())


USED = Usage(prompt_tokens=1_000_000, completion_tokens=500_000, computed_tokens=900_000)
"""400,000 computed and 600,000 cached prompt tokens: 0.4 + 0.3 + 1.0."""


def test_money_is_what_computed_cached_and_written_tokens_cost(tmp_path: Path) -> None:
    book = ledger(tmp_path / "l")
    ticket = book.reserve(10, 10)
    assert ticket
    book.settle(ticket, USED)
    assert book.account.money == pytest.approx(1.7) == book.spent
    assert (book.account.prompt_tokens, book.account.cached_tokens) == (1_000_000, 600_000)
    assert ledger(tmp_path / "l").spent == pytest.approx(1.7), "the next process knows"
    assert ledger(tmp_path / "l", currency="USD").spent == 0


def test_what_a_server_bills_beyond_what_was_sent_is_reserved_for_every_call_after_it(tmp_path: Path) -> None:
    book = ledger(tmp_path / "l", budget=9.5)
    for _ in range(3):
        ticket = book.reserve(1_000_000, 0)
        assert ticket
        book.settle(ticket, Usage(prompt_tokens=3_000_000, computed_tokens=3_000_000))
        assert ledger(tmp_path / "l").spent == book.spent
    assert book.spent == pytest.approx(9.0)
    for aware in (book, ledger(tmp_path / "l", budget=11.0)):
        with pytest.raises(BudgetError, match=r"may cost 3\.0000"):
            aware.reserve(1_000_000, 0)
    assert Ledger(tmp_path / "l", "rollouts", "another", PRICES, 11.0, "EUR").reserve(1_000_000, 0)


def test_a_reservation_of_a_killed_process_counts_at_its_worst(tmp_path: Path) -> None:
    dead = ledger(tmp_path / "l", budget=10.0)
    assert dead.reserve(4_000_000, 0)
    with (tmp_path / "l").open("ab") as f:
        f.write(b'{"id":"torn","reser')
    alive = ledger(tmp_path / "l", budget=10.0)
    assert alive.spent == pytest.approx(4.0)
    ticket = alive.reserve(5_000_000, 0)
    assert ticket and alive.reserve(2_000_000, 0) is None, "wait: what is under way may turn out cheaper"
    alive.fail(ticket, unsure=False)
    assert alive.spent == pytest.approx(4.0)
    with pytest.raises(BudgetError, match=r"raise endpoint\.budget"):
        alive.reserve(7_000_000, 0)


def test_a_call_whose_settlement_finds_no_room_on_the_disk_is_waited_for_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    book = ledger(tmp_path / "l", budget=5.0)
    ticket = book.reserve(4_000_000, 0)
    assert ticket
    with monkeypatch.context() as patch:
        patch.setattr(book, "_append", full)
        with pytest.raises(StorageError):
            book.settle(ticket, USED)
    assert book.spent == pytest.approx(4.0)
    with pytest.raises(BudgetError):
        book.reserve(2_000_000, 0)


def spend(path: Path) -> None:
    book = ledger(path, budget=50.0)
    for _ in range(100):
        try:
            ticket = book.reserve(1_000_000, 0)
        except BudgetError:
            return
        assert ticket
        book.settle(ticket, Usage(prompt_tokens=1_000_000, computed_tokens=1_000_000))


def test_processes_at_once_share_one_budget(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=spend, args=(tmp_path / "l",)) for _ in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(30)
        assert w.exitcode == 0
    assert ledger(tmp_path / "l").spent == pytest.approx(50.0)
