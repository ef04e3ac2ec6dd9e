"""Contamination is refused, never warned about: by name, by content and by room."""

from __future__ import annotations

import warnings
from pathlib import Path

import msgspec
import pytest

from ragdistill.contamination import check_disjoint, check_unseen
from ragdistill.envs import make_domain
from ragdistill.errors import ContaminationError
from ragdistill.params import load_params
from ragdistill.records import Task
from ragdistill.stages import tasks as stage

PARAMS = load_params(Path(__file__).resolve().parents[1] / "params.yaml")


def task(n: int, **change: str) -> Task:
    base = Task(id=f"t{n}", env="e", split="s", kind="k", group=f"room{n}", data="", sha256=f"sha{n}")
    return msgspec.structs.replace(base, **change)


TRAIN = [task(1), task(2), task(3)]
EVAL = [task(7), task(8)]


@pytest.mark.parametrize(
    ("change", "what"),
    [({"id": "t2"}, "task ids"), ({"sha256": "sha2"}, "task contents"), ({"group": "room2"}, "products")],
)
def test_one_shared_name_content_or_group_is_refused_and_named(change: dict[str, str], what: str) -> None:
    leaked = [*EVAL, task(9, **change)]
    with pytest.raises(ContaminationError, match=f"1 {what}") as caught:
        check_disjoint(TRAIN, leaked, "product")
    assert next(iter(change.values())) in str(caught.value)
    with pytest.raises(ContaminationError, match=what):
        check_disjoint(leaked, TRAIN, "product")


def test_shared_rooms_pass_only_where_the_split_shares_them_by_definition() -> None:
    seen = [task(9, group="room2")]
    check_disjoint(TRAIN, seen, None)
    for change in ({"id": "t2"}, {"sha256": "sha2"}):
        with pytest.raises(ContaminationError):
            check_disjoint(TRAIN, [task(9, group="room2", **change)], None)


@pytest.mark.parametrize(
    ("env", "source", "split", "helps"),
    [
        ("webshop", "official", "test", r"choose an official tasks\.eval_split \(official_test, official_eval\)\.$"),
        ("alfworld", "official", "test", r"choose an official tasks\.eval_split \(valid_seen, valid_unseen\)\.$"),
        ("webshop", "generated", "official_test", r"choose tasks\.source=official\.$"),
        ("webshop", "generated", "test", "another seed"),
        ("webshop", "official", "official_test", "another seed"),
    ],
)
def test_the_stage_names_what_is_shared_and_says_what_helps(
    env: str, source: str, split: str, helps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No seed parts the original's training from our own test, or ours from the original's."""
    domain = make_domain(msgspec.structs.replace(PARAMS.env, name=env))
    shared = {"official_test": {"id": "t2"}}.get(split, {"group": "room2"})
    made = {"dev": [task(5)], split: [task(9, **shared)]}
    monkeypatch.setattr(type(domain), "tasks", lambda _, name, *__: made.get(name, TRAIN))
    monkeypatch.chdir(tmp_path)
    change = msgspec.structs.replace
    params = change(
        PARAMS, env=change(PARAMS.env, name=env), tasks=change(PARAMS.tasks, source=source, eval_split=split)
    )
    what = "task ids" if "id" in shared else {"webshop": "products", "alfworld": "rooms"}[env]
    with pytest.raises(ContaminationError, match=rf"^1 {what} of .*{helps}"):
        stage.body(params)


def test_separate_tasks_pass_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_disjoint(TRAIN, EVAL, "room")
        check_disjoint(iter(TRAIN), iter(EVAL), "room")
        check_unseen(["t1", "t2"], EVAL, "the rollouts")


def test_one_shot_iterables_are_checked_in_full() -> None:
    with pytest.raises(ContaminationError, match="rooms"):
        check_disjoint(iter(TRAIN), iter([task(9, group="room2")]), "room")


def test_an_evaluation_task_in_trajectories_or_examples_is_refused() -> None:
    with pytest.raises(ContaminationError, match=r"1 evaluation tasks occur in the rollouts \(e\.g\. t8\)"):
        check_unseen(["t1", "t8", "t8"], EVAL, "the rollouts")
