"""Measured lift: what a hint does alone. The same training tasks are played with that one hint and with none.

In ordinary play the hints of a bucket are shown together, so their numbers are one number; here each is assigned on
its own, with the random streams of the unhinted attempts, which makes the paired difference an effect and no mere
association. Knows no engine: `plan` says what to play, `measure` what it showed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ragdistill import stats
from ragdistill.hints.bank import Bank
from ragdistill.params import LiftParams, ReportParams
from ragdistill.records import Hint, Record, StopReason, Task, Trajectory, digest


class LiftRow(Record, frozen=True, kw_only=True):
    """Success with one hint alone minus without any, over tasks that both finished."""

    hint_id: str
    bucket: str
    text: str
    tasks: int
    """Tasks compared; each counts once, however many attempts it had."""
    attempts: int
    """Finished attempts with the hint."""
    shown: float
    """Mean success with it."""
    hidden: float
    """Mean success without."""
    diff: float
    lo: float
    hi: float
    """Paired bootstrap over tasks; of zero width where no task differs, so read it with `tasks`."""
    p: float
    """Exact McNemar (with several attempts: a sign test of their shares); not corrected for the number of hints."""


def plan(bank: Bank, tasks: Sequence[Task], buckets: Mapping[str, str], params: LiftParams) -> dict[str, list[Task]]:
    """Hint id → tasks to measure it on; equal for all hints of a bucket.

    `buckets` says which bucket the environment infers for a task (by its id). At most `params.hints` hints a bucket,
    the bank's best, on at most `params.tasks` tasks, drawn by the hash of their id: never by how they were played.
    """
    pool: dict[str, list[Task]] = defaultdict(list)
    for t in sorted(tasks, key=lambda t: digest("lift", t.id)):
        pool[buckets.get(t.id, "")].append(t)
    return {h.id: pool[bucket][: params.tasks] for bucket, hints in sorted(bank.items()) for h in hints[: params.hints]}


def measure(
    hints: Iterable[Hint], hinted: Mapping[str, Sequence[Trajectory]], plain: Sequence[Trajectory], params: ReportParams
) -> list[LiftRow]:
    """One row a hint that was played, in the order given; `hinted` is hint id → its episodes, `plain` are unhinted.

    Episodes lost to infrastructure are left out, and so is a task that has none left on one side.
    """
    rows: list[LiftRow] = []
    for h in hints:
        episodes = [t for t in hinted.get(h.id, ()) if t.stop is not StopReason.INFRA_ERROR]
        a, b = paired_shares(episodes, plain)
        if not len(a):
            continue
        test = stats.paired_test(a, b, params.bootstrap, params.confidence)
        rows.append(LiftRow(
            hint_id=h.id, bucket=h.bucket, text=h.text, tasks=len(a), attempts=len(episodes), shown=stats.mean(a),
            hidden=stats.mean(b), diff=test.diff.value, lo=test.diff.lo, hi=test.diff.hi, p=test.p,
        ))  # fmt: skip
    return rows


def paired_shares(shown: Iterable[Trajectory], plain: Iterable[Trajectory]) -> tuple[stats.Floats, stats.Floats]:
    """Shares won with and without, each tasks × 1, over the tasks that both finished (none: no rows)."""
    hinted, hidden = shares(shown), shares(plain)
    tasks = sorted(hinted.keys() & hidden.keys())
    a, b = (np.array([[won[t]] for t in tasks], dtype=np.float64) for won in (hinted, hidden))
    return a, b


def shares(episodes: Iterable[Trajectory]) -> dict[str, float]:
    """Task → share of its finished episodes that were won."""
    won: dict[str, list[bool]] = defaultdict(list)
    for t in episodes:
        if t.stop is not StopReason.INFRA_ERROR:
            won[t.task_id].append(t.success)
    return {task: sum(w) / len(w) for task, w in won.items()}
