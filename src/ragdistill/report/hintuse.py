"""What happened when a hint was shown: on how many games, how many were won, and against unhinted attempts at them.

These are associations: hints of one task type are mostly shown together and share their numbers, and none was assigned
at random. Only where a hint was played alone (`hints.lift`) is there an effect of its own. Knows no file and no page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ragdistill import stats
from ragdistill.hints.lift import LiftRow, paired_shares, shares
from ragdistill.params import ReportParams
from ragdistill.records import Hint, StopReason, Trajectory
from ragdistill.stats import Interval


@dataclass(frozen=True)
class Shown:
    """Finished episodes that showed a hint."""

    episodes: int
    tasks: int
    success: Interval | None
    """Wilson's interval with tasks as observations; None where none finished."""


@dataclass(frozen=True)
class Lift:
    """Success with a hint minus without, on the training tasks that have attempts of both sorts."""

    tasks: int
    shown: float
    """Mean success of the attempts that showed it."""
    hidden: float
    """Mean success of the unhinted attempts at the same tasks."""
    diff: Interval
    """Paired bootstrap over tasks."""


@dataclass(frozen=True)
class HintUse:
    """One hint of the bank with what was measured about it."""

    hint: Hint
    teacher: Shown
    """On training tasks."""
    retrieved: Shown
    """On evaluation tasks, by the agent that retrieves hints in every episode."""
    lift: Lift | None
    together: tuple[str, ...]
    """Texts of the hints that every one of these episodes showed too: they share all numbers of this one."""
    alone: LiftRow | None = None
    """Measured with this hint alone; None where it was not."""


def hint_use(
    hints: Sequence[Hint],
    taught: Sequence[Trajectory],
    unhinted: Sequence[Trajectory],
    retrieved: Sequence[Trajectory],
    params: ReportParams,
    measured: Sequence[LiftRow] = (),
) -> list[HintUse]:
    """Measure each hint, in the order given.

    Args:
        hints: the bank.
        taught: episodes of the hinted teacher on training tasks.
        unhinted: attempts without hints on training tasks.
        retrieved: evaluation episodes with retrieved hints.
        params: number of resamples and confidence level.
        measured: what each hint does alone, where that was played.

    Episodes lost to infrastructure are left out.
    """
    texts = {h.id: h.text for h in hints}
    teacher, evaluation = _by_hint(taught), _by_hint(retrieved)
    plain = [t for t in unhinted if not t.hints]
    alone = {row.hint_id: row for row in measured}
    return [
        HintUse(
            hint=h,
            teacher=_shown(teacher.get(h.id, ()), params.confidence),
            retrieved=_shown(evaluation.get(h.id, ()), params.confidence),
            lift=_lift(teacher.get(h.id, ()), plain, params),
            together=_together(h.id, [*teacher.get(h.id, ()), *evaluation.get(h.id, ())], texts),
            alone=alone.get(h.id),
        )
        for h in hints
    ]


def _by_hint(episodes: Iterable[Trajectory]) -> dict[str, list[Trajectory]]:
    out: dict[str, list[Trajectory]] = defaultdict(list)
    for t in episodes:
        for hint in t.hint_ids:
            out[hint].append(t)
    return out


def _shown(episodes: Sequence[Trajectory], confidence: float) -> Shown:
    won = shares(episodes)
    finished = sum(t.stop is not StopReason.INFRA_ERROR for t in episodes)
    success = stats.wilson(sum(won.values()), len(won), confidence) if won else None
    return Shown(finished, len(won), success)


def _lift(shown: Sequence[Trajectory], plain: Sequence[Trajectory], params: ReportParams) -> Lift | None:
    a, b = paired_shares(shown, plain)
    if not len(a):
        return None
    diff = stats.paired_interval(a, b, params.bootstrap, params.confidence)
    return Lift(len(a), stats.mean(a), stats.mean(b), diff)


def _together(own: str, episodes: Sequence[Trajectory], texts: Mapping[str, str]) -> tuple[str, ...]:
    if not episodes:
        return ()
    always = set.intersection(*(set(t.hint_ids) for t in episodes)) - {own}
    return tuple(sorted(texts[i] for i in always if i in texts))
