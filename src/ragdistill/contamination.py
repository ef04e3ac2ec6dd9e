"""Refuses evaluation tasks that touch hints or training. It never warns: a contaminated number is worse than none."""

from __future__ import annotations

from collections.abc import Iterable

from ragdistill.errors import ContaminationError
from ragdistill.records import Task

OWN = ("test", "dev")
"""Evaluation splits that share no group with training; others are official, and may do so by definition."""
REMEDY = "regenerate the tasks with another seed or remove them from the training list"


def check_disjoint(
    training: Iterable[Task], evaluation: Iterable[Task], group: str | None, remedy: str = REMEDY
) -> None:
    """No task id and no task content of `evaluation` occurs in `training`, and no group, which is called `group`.

    With None groups may be shared, as official splits do; `remedy` is what helps.
    """
    training, evaluation = list(training), list(evaluation)
    checks = [("task ids", {t.id for t in training}, {t.id for t in evaluation})]
    checks.append(("task contents", {t.sha256 for t in training}, {t.sha256 for t in evaluation}))
    if group is not None:
        checks.append((f"{group}s", {t.group for t in training}, {t.group for t in evaluation}))
    for what, a, b in checks:
        if a & b:
            raise ContaminationError(
                f"{len(a & b)} {what} of the evaluation also occur in training (e.g. {min(a & b)}); {remedy}."
            )


def check_unseen(task_ids: Iterable[str], evaluation: Iterable[Task], what: str) -> None:
    """No id of `task_ids` (trajectories, examples) is an evaluation task."""
    shared = set(task_ids) & {t.id for t in evaluation}
    if shared:
        raise ContaminationError(f"{len(shared)} evaluation tasks occur in {what} (e.g. {min(shared)}); remove them.")
