"""How far something long has got: rooms report it, one stage or command shows it.

    with display("demos"):                                   # once, by a stage or a command
        for game in track(games, "games", len(games)): ...
        with bar("optimiser steps", 300) as steps:
            steps.at(12, note="loss 0.123")

On a terminal that is a live line, elsewhere a line every 30 seconds; nothing in the first five, and nothing where `CI`
is set. Without a display, reporting shows nothing. It also counts how much was taken from a journal or a cache instead
of done. Knows no stage, and decides no result.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

FIRST, EVERY, FRAME = 5.0, 30.0, 0.2
"""Seconds until anything is shown, between two lines of a log, between two pictures of a live line."""
T = TypeVar("T")


@dataclass
class Bar:
    """One piece of work."""

    unit: str
    """What is counted ("episodes"), or, where nothing is, what is done ("fetching the model")."""
    total: int | None = None
    """None: not known (yet)."""
    done: int = 0
    replayed: int = 0
    """Of `done`: taken from a journal or a cache."""
    note: str = ""
    hidden: bool = False
    """Set where another process shows its own."""
    started: float = field(default_factory=time.monotonic)

    def at(self, done: int, replayed: int = 0, note: str = "") -> None:
        """`done` are finished by now, `replayed` of them without being done."""
        self.done, self.replayed, self.note = done, replayed, note

    def words(self) -> str:
        """`12/36 episodes, ETA 3 min, success 25%, 4 from the cache`: what matters first, a narrow terminal cuts it."""
        seconds = time.monotonic() - self.started
        count = f"{self.done}/{self.total} " if self.total is not None else f"{self.done} " if self.done else ""
        parts, fresh = [count + self.unit], self.done - self.replayed
        if self.total is None:
            parts.append(f"{duration(seconds)} so far")
        elif fresh and self.done < self.total:
            parts.append(f"ETA {duration((self.total - self.done) * seconds / fresh)}")
        parts += [self.note] if self.note else []
        parts += [f"{self.replayed} from the cache"] if self.replayed else []
        return ", ".join(parts)


@dataclass
class Tally:
    """Everything that was reported while one display was open."""

    bars: list[Bar] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Pieces of work, of all kinds."""
        return sum(b.done for b in self.bars)

    @property
    def share(self) -> float:
        """Of all work that was counted, what was taken from a journal or a cache."""
        return sum(b.replayed for b in self.bars) / self.done if self.done else 0.0

    def words(self) -> str:
        """`36 of 36 episodes from the cache`; empty where everything was done."""
        units: dict[str, list[int]] = {}
        for b in self.bars:
            done, replayed = units.setdefault(b.unit, [0, 0])
            units[b.unit] = [done + b.done, replayed + b.replayed]
        return ", ".join(f"{r} of {n} {unit} from the cache" for unit, (n, r) in units.items() if r)


_open: list[Bar] = []
"""The innermost is shown."""
_tallies: list[Tally] = []


@contextmanager
def bar(unit: str, total: int | None = None, hidden: bool = False) -> Iterator[Bar]:
    """A piece of work with `total` parts; whoever has the display shows it."""
    made = Bar(unit, total, hidden=hidden)
    for tally in _tallies:
        tally.bars.append(made)
    _open.append(made)
    try:
        yield made
    finally:
        _open.remove(made)


def track(items: Iterable[T], unit: str, total: int) -> Iterator[T]:
    """`items`, counted as they are used."""
    with bar(unit, total) as counted:
        for done, item in enumerate(items, 1):
            yield item
            counted.at(done)


@contextmanager
def display(name: str) -> Iterator[Tally]:
    """Show on stderr what is reported inside, each line beginning with `name`."""
    tally, stop = Tally(), threading.Event()
    _tallies.append(tally)
    whole = Bar("working")
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    shown = threading.Thread(target=_live if live else _lines, args=(name, whole, stop), daemon=True)
    if not os.environ.get("CI"):
        shown.start()
    try:
        yield tally
    finally:
        stop.set()
        if shown.is_alive():
            shown.join()
        _tallies.remove(tally)


def duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _lines(name: str, whole: Bar, stop: threading.Event) -> None:
    while not stop.wait(EVERY):
        now = _open[-1] if _open else whole
        if not now.hidden:
            print(f"{name}: {now.words()}", file=sys.stderr, flush=True)


def _live(name: str, whole: Bar, stop: threading.Event) -> None:
    if stop.wait(FIRST):
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.table import Column

    line = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # a narrow terminal cuts this, not the name
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(16))
    text = TextColumn("{task.fields[words]}", markup=False, table_column=line)
    # what is said on this terminal goes above the line; what goes into a file is none of its business
    where = {"console": Console(stderr=True), "redirect_stdout": sys.stdout.isatty()}
    with Progress(*columns, text, **where, transient=True, auto_refresh=False, expand=True) as picture:
        at, task = whole, picture.add_task(name, total=None, words=whole.words())
        while not stop.wait(FRAME):
            now = _open[-1] if _open else whole
            if now is not at:  # a task whose total was known cannot go back to an unknown one
                picture.remove_task(task)
                at, task = now, picture.add_task(name, total=now.total, words=now.words())
            picture.update(
                task, total=now.total, completed=now.done, words=now.words(), visible=not now.hidden, refresh=True
            )
