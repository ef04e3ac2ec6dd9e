"""Contamination is refused, never warned about: by name, by content and by room."""

from __future__ import annotations

import warnings

import msgspec
import pytest

from ragdistill.contamination import check_disjoint, check_unseen
from ragdistill.errors import ContaminationError
from ragdistill.records import Task


def task(n: int, **change: str) -> Task:
    base = Task(id=f"t{n}", env="e", split="s", kind="k", group=f"room{n}", data="", sha256=f"sha{n}")
    return msgspec.structs.replace(base, **change)


TRAIN = [task(1), task(2), task(3)]
EVAL = [task(7), task(8)]


@pytest.mark.parametrize(
    ("change", "what"),
    [({"id": "t2"}, "task ids"), ({"sha256": "sha2"}, "game contents"), ({"group": "room2"}, "rooms")],
)
def test_one_shared_name_content_or_room_is_refused_and_named(change: dict[str, str], what: str) -> None:
    leaked = [*EVAL, task(9, **change)]
    with pytest.raises(ContaminationError, match=f"1 {what}") as caught:
        check_disjoint(TRAIN, leaked, rooms=True)
    assert next(iter(change.values())) in str(caught.value)
    with pytest.raises(ContaminationError, match=what):
        check_disjoint(leaked, TRAIN, rooms=True)


def test_shared_rooms_pass_only_where_the_split_shares_them_by_definition() -> None:
    seen = [task(9, group="room2")]
    check_disjoint(TRAIN, seen, rooms=False)
    for change in ({"id": "t2"}, {"sha256": "sha2"}):
        with pytest.raises(ContaminationError):
            check_disjoint(TRAIN, [task(9, group="room2", **change)], rooms=False)


def test_separate_tasks_pass_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_disjoint(TRAIN, EVAL, rooms=True)
        check_disjoint(iter(TRAIN), iter(EVAL), rooms=True)
        check_unseen(["t1", "t2"], EVAL, "the rollouts")


def test_one_shot_iterables_are_checked_in_full() -> None:
    with pytest.raises(ContaminationError, match="rooms"):
        check_disjoint(iter(TRAIN), iter([task(9, group="room2")]), rooms=True)


def test_an_evaluation_task_in_trajectories_or_examples_is_refused() -> None:
    with pytest.raises(ContaminationError, match=r"1 evaluation tasks occur in the rollouts \(e\.g\. t8\)"):
        check_unseen(["t1", "t8", "t8"], EVAL, "the rollouts")
