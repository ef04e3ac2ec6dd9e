"""Measured lift: what is played, what counts, and that the numbers are those of paired tasks."""

from __future__ import annotations

import msgspec
import pytest

from ragdistill.hints.bank import build_bank
from ragdistill.hints.lift import measure, plan
from ragdistill.params import LiftParams, ReportParams
from ragdistill.records import Hint, StopReason, Task, Trajectory
from tests.test_hints import PARAMS, hint, play

REPORT = ReportParams(bootstrap=500, confidence=0.95)
A, B = hint("Open {drawer} first.", "look", 0.9), hint("Wash {object} at once.", "look", 0.5)


def task(name: str) -> Task:
    return Task(id=name, env="e", split="train", kind="k", group="g", data="", sha256="")


def played(name: str, won: bool, attempt: int = 0, stop: StopReason | None = None) -> Trajectory:
    return play("goal", "look", ["look"], won=won, task=name, attempt=attempt, stop=stop)


def rows(hinted: dict[str, list[Trajectory]], plain: list[Trajectory], hints: tuple[Hint, ...] = (A, B)):
    return measure(hints, hinted, plain, REPORT)


def test_a_hint_is_measured_on_tasks_of_its_bucket_only_and_all_hints_on_the_same() -> None:
    bank, _ = build_bank([A, B, hint("Go to {place}.", "other")], PARAMS)
    tasks = [task(f"t{i}") for i in range(30)]
    buckets = {t.id: "look" if i % 2 else "other" for i, t in enumerate(tasks)} | {"t1": ""}
    planned = plan(bank, tasks, buckets, LiftParams(hints=2, tasks=6, attempts=1))
    assert planned[A.id] == planned[B.id] and len(planned[A.id]) == 6
    assert all(buckets[t.id] == "look" for t in planned[A.id])
    assert planned == plan(bank, tasks[::-1], buckets, LiftParams(hints=2, tasks=6, attempts=1))
    assert set(plan(bank, tasks, buckets, LiftParams(hints=1, tasks=6, attempts=1))) >= {A.id}
    assert B.id not in plan(bank, tasks, buckets, LiftParams(hints=1, tasks=6, attempts=1))


def test_the_lift_is_the_paired_difference_over_tasks_with_its_interval() -> None:
    plain = [played(f"t{i}", i < 2) for i in range(8)]
    a, b = rows({A.id: [played(f"t{i}", i < 6) for i in range(8)], B.id: plain}, plain)
    assert (a.tasks, a.shown, a.hidden, a.diff) == (8, 0.75, 0.25, 0.5)
    assert 0 < a.lo < a.diff < a.hi <= 1 and a.p == pytest.approx(0.125)
    assert (b.diff, b.lo, b.hi, b.p) == (0.0, 0.0, 0.0, 1.0)


def test_attempts_are_averaged_before_tasks_are_compared() -> None:
    plain = [played("t0", False, 0), played("t0", True, 1), played("t1", False, 0)]
    (row,) = rows({A.id: [played("t0", True, 0), played("t0", True, 1), played("t1", False, 0)]}, plain)
    assert (row.tasks, row.attempts, row.diff) == (2, 3, 0.25)


def test_infrastructure_faults_are_neither_success_nor_failure() -> None:
    lost = msgspec.structs.replace(played("t1", False), stop=StopReason.INFRA_ERROR)
    (row,) = rows({A.id: [played("t0", True), lost]}, [played("t0", False), played("t1", False)])
    assert (row.tasks, row.attempts, row.diff) == (1, 1, 1.0)
    assert rows({A.id: [lost]}, [played("t1", True)]) == []
    assert rows({}, []) == []
