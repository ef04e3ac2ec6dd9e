"""What calls cost: tokens and money of each, written down before and after, and a budget that is kept.

An append-only file. A call reserves its worst case before it is sent and is settled by what the server reports; what
was sent and never answered, or answered without a bill, counts in full, because it may be billed. So the budget holds
over kills, for several processes at once and for all experiments that share the file: each appends under a lock and
reads what the others wrote. A server that bills for text it was not sent (a hidden system prompt) can exceed it by the
calls then under way; those after them reserve as much more. Knows no HTTP and no journal; a call that the journal
answers is never entered.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar
from uuid import uuid4

import msgspec

from ragdistill.errors import BudgetError
from ragdistill.files import storage_error
from ragdistill.params import PriceParams
from ragdistill.records import Record, Usage

_MILLION = 1_000_000
UNTOLD = "at worst, for calls whose bill no server told"
"""Said of unsure money."""
_S = TypeVar("_S", bound="Spent")


class Entry(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One line: a reservation (`reserved`), or the settlement of one (`paid`)."""

    id: str
    stage: str = ""
    model: str = ""
    currency: str = ""
    reserved: float | None = None
    """Most the call can cost."""
    prompt_bound: int = 0
    """Of a reservation: more tokens the prompt that is sent cannot be."""
    paid: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    unsure: bool = False
    """The server did not say what it bills: the worst case counts."""


class Spent(Record, frozen=True, kw_only=True):
    """Tokens and money of one stage's calls to one model."""

    stage: str
    model: str
    currency: str
    paid_calls: int = 0
    """Answered by the server and billed."""
    failed_attempts: int = 0
    """Without an answer, or without anything to bill."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens: those the server had computed before and bills lower."""
    completion_tokens: int = 0
    money: float = 0.0
    unsure_money: float = 0.0
    """Worst case of calls that were sent and whose bill the server never told, in `money` too."""


class Account(Spent, frozen=True, kw_only=True):
    """What one process has spent, and what it got for nothing."""

    replayed_calls: int = 0
    """Answered from the journal, for nothing."""
    most_at_once: int = 0
    """Calls under way at the same time."""


def cost(usage: Usage, prices: PriceParams) -> float:
    """Money for one call; what was not computed of its prompt was cached."""
    computed = usage.computed_tokens - usage.completion_tokens
    cached = usage.prompt_tokens - computed
    answer = usage.completion_tokens * prices.completion
    return (computed * prices.prompt + cached * prices.cached + answer) / _MILLION


def spending(path: Path) -> list[Spent]:
    """What all processes have spent, killed ones too, by stage, model and currency.

    A reservation that was never settled counts at its worst.
    """
    reserved: dict[str, Entry] = {}
    settled: list[tuple[Entry, Entry]] = []
    for entry in _entries(path.read_bytes().split(b"\n") if path.exists() else []):
        if entry.reserved is not None:
            reserved[entry.id] = entry
        if entry.paid is not None:
            settled.append((reserved.pop(entry.id, entry), entry))
    lost = [(r, msgspec.structs.replace(r, paid=r.reserved, unsure=True)) for r in reserved.values()]
    sums: dict[tuple[str, str, str], Spent] = {}
    for by, end in settled + lost:
        key = (by.stage, by.model, by.currency)
        before = sums.get(key) or Spent(stage=by.stage, model=by.model, currency=by.currency)
        answered, money = bool(end.prompt_tokens or end.completion_tokens), end.paid or 0.0
        sums[key] = _plus(
            before, paid_calls=answered, failed_attempts=not answered, prompt_tokens=end.prompt_tokens,
            cached_tokens=end.cached_tokens, completion_tokens=end.completion_tokens, money=money,
            unsure_money=money if end.unsure else 0.0,
        )  # fmt: skip
    return [sums[key] for key in sorted(sums)]


def _plus(account: _S, **more: float) -> _S:
    now = {name: getattr(account, name) + value for name, value in more.items()}
    return msgspec.structs.replace(account, **now)


def _entries(lines: Iterable[bytes]) -> Iterator[Entry]:
    """What can be read of the file's lines; one that was cut off is nothing."""
    for line in lines:
        with suppress(msgspec.DecodeError):
            yield msgspec.json.decode(line, type=Entry)


class Ledger:
    """The file, seen from one stage that pays one model."""

    def __init__(
        self, path: Path, stage: str, model: str, prices: PriceParams, budget: float | None, currency: str
    ) -> None:
        """`budget`: money that all stages together may cost, in `currency`; entries in another do not count."""
        self.path, self.prices, self.budget = path, prices, budget
        self.account = Account(stage=stage, model=model, currency=currency)
        """Of this process alone."""
        self._read = 0
        """Bytes of the file that were taken in."""
        self._open: dict[str, float] = {}
        """Reservations of all processes that are not settled."""
        self._bounds: dict[str, int] = {}
        """Of those to this model: `prompt_bound`."""
        self._hidden = 0
        """Most prompt tokens that this model's server billed beyond such a bound."""
        self._paid = self._unsure = 0.0
        self._mine: set[str] = set()
        with self._locked():
            pass

    @property
    def spent(self) -> float:
        """Money of all stages, with what is under way or unsure at its worst."""
        return self._paid + sum(self._open.values())

    def reserve(self, prompt_bound: int, completion_bound: int) -> str | None:
        """Enter a call of at most so many tokens; its id, or None while calls under way may leave enough for it.

        Raises `BudgetError` when it would not fit even if nothing more came of those.
        """
        dearest = max(self.prices.prompt, self.prices.cached)
        with self._locked() as file:
            worst = ((prompt_bound + self._hidden) * dearest + completion_bound * self.prices.completion) / _MILLION
            if self.budget is not None and self.spent + worst > self.budget:
                if self._mine:
                    return None
                raise BudgetError(self._no_money(worst))
            entry = Entry(
                id=uuid4().hex, stage=self.account.stage, model=self.account.model, currency=self.account.currency,
                reserved=worst, prompt_bound=prompt_bound,
            )  # fmt: skip
            self._append(file, entry)
        self._mine.add(entry.id)
        return entry.id

    def settle(self, id: str, usage: Usage, unsure: bool = False) -> None:
        """The call was answered and costs what `usage` says; `unsure`: the server did not say it, the worst counts."""
        cached = usage.prompt_tokens + usage.completion_tokens - usage.computed_tokens
        money = self._open.get(id, 0.0) if unsure else cost(usage, self.prices)
        self._close(Entry(
            id=id, paid=money, prompt_tokens=usage.prompt_tokens, cached_tokens=cached, unsure=unsure,
            completion_tokens=usage.completion_tokens, stage=self.account.stage, currency=self.account.currency,
        ))  # fmt: skip
        self._count(
            paid_calls=1, prompt_tokens=usage.prompt_tokens, cached_tokens=cached,
            completion_tokens=usage.completion_tokens, money=money, unsure_money=money if unsure else 0.0,
        )  # fmt: skip

    def fail(self, id: str, unsure: bool) -> None:
        """The attempt brought no answer; `unsure`: it may be billed all the same."""
        money = self._open.get(id, 0.0) if unsure else 0.0
        self._close(Entry(id=id, paid=money, unsure=unsure, stage=self.account.stage, currency=self.account.currency))
        self._count(failed_attempts=1, money=money, unsure_money=money)

    def replayed(self) -> None:
        """A call was answered for nothing."""
        self._count(replayed_calls=1)

    def _count(self, **more: float) -> None:
        self.account = _plus(self.account, **more)

    def _close(self, entry: Entry) -> None:
        self._mine.discard(entry.id)  # first: if the file refuses the line, nobody must wait for this call's money
        with self._locked() as file:
            self._append(file, entry)

    def _no_money(self, worst: float) -> str:
        unit, unsure = self.account.currency, self._unsure + sum(self._open.values())
        return (
            f"endpoint.budget of {self.budget:.2f} {unit} might be exceeded: {self.spent:.4f} are spent in this project"
            + (f" ({unsure:.4f} of it {UNTOLD})" if unsure else "")
            + f" and the next call may cost {worst:.4f}; raise endpoint.budget and run again, what is finished is kept "
            "and not paid again."
        )

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, ours alone for a moment, with everything in it taken in."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(self._read)
                *lines, torn = file.read().split(b"\n")
                if torn:  # a writer was killed in the middle; closed off, so that the next line stands alone
                    file.write(b"\n")
                    lines.append(torn)
                self._take(lines)
                self._read = file.seek(0, os.SEEK_END)
                yield file
        except OSError as e:
            designed = storage_error(e, str(self.path))
            raise designed or e from None

    def _append(self, file: IO[bytes], entry: Entry) -> None:
        line = msgspec.json.encode(entry)
        file.write(line + b"\n")
        file.flush()
        self._take([line])
        self._read += len(line) + 1

    def _take(self, lines: list[bytes]) -> None:
        for entry in _entries(lines):
            if entry.currency != self.account.currency:
                continue
            if entry.reserved is not None:
                self._open[entry.id] = entry.reserved
                if entry.model == self.account.model:
                    self._bounds[entry.id] = entry.prompt_bound
            if entry.paid is not None:
                self._open.pop(entry.id, None)
                bound = self._bounds.pop(entry.id, 0)
                if bound and not entry.unsure:
                    self._hidden = max(self._hidden, entry.prompt_tokens - bound)
                self._paid += entry.paid
                self._unsure += entry.paid if entry.unsure else 0.0
