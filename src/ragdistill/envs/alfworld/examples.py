"""Example episodes for prompts: two won games of each official task type, played on the real engine in training rooms.

`examples.json` is written by `scripts/make_examples.py` and proved by tests, which generate each game anew and play it.
Pure data: it imports no engine. It knows no agent; each shows the episodes in its own form.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from ragdistill.envs import Demo
from ragdistill.envs.alfworld.goals import KINDS, TRAIN, check_plan, infer_kind
from ragdistill.records import Record, read_json


class Played(Record, frozen=True, kw_only=True):
    """An episode and the generated game it was played in (arguments of `generator.generate_game`)."""

    plan: int
    seed: int
    object: str
    place: str
    demo: Demo


@cache
def played() -> tuple[Played, ...]:
    """All examples, by task type; `ContaminationError` when one is of a room that a generated split evaluates in."""
    found = msgspec.convert(read_json(Path(__file__).with_name("examples.json")), tuple[Played, ...])
    for example in found:
        check_plan(example.plan, TRAIN)
    return found


def library() -> dict[str, list[Demo]]:
    """Task type → its examples, in the order they are shown."""
    return {kind: [p.demo for p in played() if p.demo.kind == kind] for kind in KINDS}


def example_type(first_observation: str) -> str:
    """Task type, read from the goal sentence that closes the first observation."""
    return infer_kind(first_observation.rpartition("Your task is to:")[2])
