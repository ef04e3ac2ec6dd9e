"""What a measurement of `rollout_speed.py` found, and the tables it prints of several. Measures nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ragdistill.records import Trajectory
from ragdistill.stats import mean_interval, paired_test, ratio_interval, wilson

MODES = {
    "a": "transformers float32, one by one",
    "b": "transformers float32, batched",
    "c": "ours, engine auto",
    "d": "ours, torch float32",
    "e": "ours, OpenVINO float32",
    "f": "transformers, batched, best precision",
    "s": "scripted",
}
TIMES_A, TIMES_B, AGREEMENT, ENVIRONMENT = 8.0, 3.0, 0.98, 0.15
"""Bars: at least so many times the episodes a minute of a and of b, so many equal actions, at most so much of the time
in environments."""
DRAWS = 4000
"""Bootstrap resamples of an interval."""


@dataclass(frozen=True)
class Measured:
    """What a measurement found."""

    played: tuple[Trajectory, ...]
    """Of turns answered alone: the episodes that they were drawn from."""
    seconds: float
    """Of turns answered alone: what playing all of `played` would have taken."""
    shares: Mapping[str, float]
    """Wall time: some reply being made, else some environment at work, else neither."""
    env_cpu: float
    """CPU seconds of the environment workers; they overlap with the engine."""
    memory: tuple[tuple[float, float], ...]
    """MiB of (process, workers): at the start, at the end, at the peak of the sum."""
    agreement: tuple[tuple[int, int], ...]
    """(equal actions, actions) of each history."""
    replaced: int = 0
    """Environment workers that were replaced."""
    quarters: tuple[float, ...] = ()
    """MiB of the workers: the peak in each quarter of the time."""
    alone: tuple[float, ...] = ()
    """Seconds of each turn, or batch of turns, that was answered instead of playing."""

    @property
    def steps(self) -> int:
        """Turns of all episodes."""
        return sum(len(t.steps) for t in self.played)


def row(*cells: str) -> None:
    """A line of a table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def compare(found: Mapping[str, Measured]) -> None:
    """The modes beside each other, then how alike their play is."""
    row("engine", "episodes", "episodes/min", "steps/min", "generated tokens/s", "× a, episodes", "× a, steps",
        "× b, episodes", "success [95 %]", "engine", "environment", "elsewhere", "environment CPU",
        "peak memory, MiB")  # fmt: skip
    row(*["---"] * 14)
    for mode in sorted(found):
        row(MODES[mode], *_cells(mode, found))
    print()
    exact = "d" if "d" in found else "a"
    for mode in ("a", "b"):
        if mode in found and found[mode].alone:
            _tell_alone(mode, found[mode])
    if "c" in found and exact in found:
        _tell_alike(found["c"], found[exact], exact)
    if {"a", "b", "c"} <= set(found):
        _tell_bars(found)


def _cells(mode: str, found: Mapping[str, Measured]) -> list[str]:
    m, a, b = found[mode], found.get("a"), found.get("b")
    n, won, minutes = len(m.played), sum(t.success for t in m.played), m.seconds / 60
    tokens = sum(t.usage.completion_tokens for t in m.played)
    ratios = [
        f"{_times(m, a):.1f}" if a else "–",
        f"{m.steps / m.seconds / (a.steps / a.seconds):.1f}" if a else "–",
        f"{_times(m, b):.1f}" if b else "–",
    ]
    success, shares = wilson(won, n), [f"{100 * m.shares[k]:.0f} %" for k in ("engine", "environment", "elsewhere")]
    return [
        f"{len(m.alone)} {_PIECES[mode]}" if m.alone else str(n), f"{n / minutes:.1f}", f"{m.steps / minutes:.0f}",
        f"{tokens / m.seconds:.0f}", *ratios,
        "as d" if m.alone else f"{won}/{n} [{100 * success.lo:.0f}–{100 * success.hi:.0f}]", *shares,
        f"{100 * m.env_cpu / m.seconds:.0f} %", f"{sum(m.memory[2]):.0f}",
    ]  # fmt: skip


_PIECES = {"a": "turns", "b": "batches"}
"""What a and b answered instead of playing."""


def _times(m: Measured, other: Measured) -> float:
    """Episodes a minute of `m`, in those of `other`."""
    return len(m.played) / m.seconds / (len(other.played) / other.seconds)


def _tell_alone(mode: str, m: Measured) -> None:
    each = mean_interval(np.array(m.alone)[:, None], DRAWS, 0.95)
    equal, total = (sum(column) for column in zip(*m.agreement, strict=True))
    what = "drawn at random, each from its whole history" if mode == "a" else "in batches of equally long histories"
    print(f"{mode} answered {total} of d's {m.steps} turns, {what}: {each.value:.2f} s each "
          f"[{each.lo:.2f}, {each.hi:.2f}]; its action was d's in {equal} of {total}. "
          "Its rates are those of playing d's episodes so.")  # fmt: skip


def _tell_bars(found: Mapping[str, Measured]) -> None:
    ours = found["c"]
    a, b, outside = _times(ours, found["a"]), _times(ours, found["b"]), ours.shares["environment"]
    equal, total = (sum(column) for column in zip(*ours.agreement, strict=True)) if ours.agreement else (0, 0)
    share = equal / total if total else 0.0
    met = a >= TIMES_A and b >= TIMES_B and share >= AGREEMENT and outside <= ENVIRONMENT
    print(f"Bars: at least {TIMES_A:g} × the episodes a minute of a and {TIMES_B:g} × those of b, {AGREEMENT:.0%} "
          f"equal actions, at most {ENVIRONMENT:.0%} of the time in environments. Found: {a:.1f} ×, {b:.1f} ×, "
          f"{share:.1%}, {outside:.0%}: {'reached' if met else 'missed'}.")  # fmt: skip


def _tell_alike(ours: Measured, exact: Measured, name: str) -> None:
    if ours.agreement:
        equal, total = (np.array(column, float)[:, None] for column in zip(*ours.agreement, strict=True))
        share = ratio_interval(equal, total, DRAWS, 0.95)
        found = f"{100 * share.value:.1f} % [{100 * share.lo:.1f}, {100 * share.hi:.1f}]" if share else "none"
        print(f"On {name}'s histories, c's next action equals {name}'s in {found} of {total.sum():.0f} turns with an "
              f"action ({len(total)} episodes, bootstrap over episodes).")  # fmt: skip
    if [t.task_id for t in ours.played] == [t.task_id for t in exact.played]:
        won = [np.array([[float(t.success)] for t in m.played]) for m in (ours, exact)]
        test = paired_test(won[0], won[1], DRAWS, 0.95)
        diff = f"{100 * test.diff.value:+.1f} points [{100 * test.diff.lo:+.1f}, {100 * test.diff.hi:+.1f}]"
        print(f"Success of c − {name} on the same {test.n} games: {diff} (bootstrap over games; {test.wins} won by c "
              f"alone, {test.losses} by {name} alone, exact McNemar p = {test.p:.3f}).")  # fmt: skip


def growth(found: Sequence[Measured], recycle: int) -> None:
    """How time and memory go with the number of episodes."""
    print(f"Environment workers are replaced after {recycle} resets.\n")
    row("episodes", "seconds", "seconds/episode", "steps/episode", "seconds/step", "environment CPU s/episode",
        "workers replaced", "process MiB, start → end", "workers MiB, peak of each quarter",
        "peak of both, MiB")  # fmt: skip
    row(*["---"] * 10)
    for m in found:
        n, (start, end, peak) = len(m.played), m.memory
        row(
            str(n), f"{m.seconds:.1f}", f"{m.seconds / n:.2f}", f"{m.steps / n:.1f}", f"{m.seconds / m.steps:.3f}",
            f"{m.env_cpu / n:.2f}", str(m.replaced), f"{start[0]:.0f} → {end[0]:.0f}",
            ", ".join(f"{q:.0f}" for q in m.quarters), f"{sum(peak):.0f}",
        )  # fmt: skip
