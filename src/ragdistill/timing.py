"""How long stages took, and whether they did their work or took it from a journal or a cache. Knows no stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from ragdistill.errors import DataError
from ragdistill.records import Record, read_json, write_json

COLD = 0.1
"""A run that replayed at most this share of its work counts as one that did all of it."""


class Timing(Record, frozen=True, kw_only=True):
    """Wall time of one stage."""

    seconds: float
    """Of its last run."""
    replayed: float | None = None
    """Share of that run's work that was taken from a journal or a cache; None: not recorded."""
    work: int = 0
    """Pieces of work (episodes, optimiser steps, games) of that run."""
    cold: float | None = None
    """Seconds of the last run that did as much work all by itself; None where there was none."""

    @property
    def best(self) -> float:
        """What comes nearest to what the stage takes: a cold run, or else the last one."""
        return self.seconds if self.cold is None else self.cold


def note(path: Path, stage: str, seconds: float, share: float, work: int) -> None:
    """Write a run's time to `path`, keeping the time of the last cold run of the same amount of work."""
    cold = seconds
    if share > COLD:
        before = _last(path)
        cold = before.cold if before and before.work == work else None
    now = Timing(seconds=seconds, replayed=round(share, 4), work=work, cold=cold)
    write_json(path, {"stage": stage, **msgspec.to_builtins(now)})


def collect(folder: Path) -> dict[str, Timing]:
    """Stage → what `note` wrote in `folder`."""
    return {raw.pop("stage"): _timing(raw) for raw in map(read_json, sorted(folder.glob("*.json")))}


def read_timings(path: Path) -> dict[str, Timing]:
    """A file of timings by stage; bare seconds, as earlier versions wrote them, say nothing about replays."""
    raw = read_json(path)
    if not isinstance(raw, Mapping):
        raise DataError(f"{path} holds no timings; delete it and run `dvc repro report`.")
    return {stage: _timing(entry) for stage, entry in raw.items()}


def _timing(raw: object) -> Timing:
    try:
        return msgspec.convert(raw if isinstance(raw, Mapping) else {"seconds": raw}, Timing)
    except msgspec.ValidationError as e:
        raise DataError(f"A stage's timing is not what it should be ({e}); delete .cache/timing.") from None


def _last(path: Path) -> Timing | None:
    if not path.is_file():
        return None
    raw = read_json(path)
    raw.pop("stage", None)
    return _timing(raw)
