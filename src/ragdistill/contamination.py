"""Refuses evaluation tasks that touch hints or training. It never warns: a contaminated number is worse than none."""

from __future__ import annotations

from collections.abc import Iterable

from ragdistill.errors import ContaminationError
from ragdistill.records import Task


def check_disjoint(training: Iterable[Task], evaluation: Iterable[Task], rooms: bool) -> None:
    """No task id and no game content of `evaluation` occurs in `training`; with `rooms`, no group does either.

    `rooms` is off for official `valid_seen`, whose rooms are those of training by definition.
    """
    training, evaluation = list(training), list(evaluation)
    checks = [("task ids", {t.id for t in training}, {t.id for t in evaluation})]
    checks.append(("game contents", {t.sha256 for t in training}, {t.sha256 for t in evaluation}))
    if rooms:
        checks.append(("rooms", {t.group for t in training}, {t.group for t in evaluation}))
    for what, a, b in checks:
        if a & b:
            raise ContaminationError(
                f"{len(a & b)} {what} of the evaluation also occur in training (e.g. {min(a & b)}); "
                "regenerate the tasks with another seed or remove them from the training list."
            )


def check_unseen(task_ids: Iterable[str], evaluation: Iterable[Task], what: str) -> None:
    """No id of `task_ids` (trajectories, examples) is an evaluation task."""
    shared = set(task_ids) & {t.id for t in evaluation}
    if shared:
        raise ContaminationError(f"{len(shared)} evaluation tasks occur in {what} (e.g. {min(shared)}); remove them.")
