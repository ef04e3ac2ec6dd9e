"""Example episodes for prompts: two purchases with the full reward, of embedded products that no task asks for.

They are of the cold start's split, which no own task is of, and official tasks are of the original's catalogue only.
`examples.json` is written by `scripts/make_examples.py` and proved by tests, which play it in the real shop. Pure data.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from ragdistill.envs import Demo
from ragdistill.params import WebshopParams
from ragdistill.records import read_json

SHOPPING = "shopping"
"""The one task type."""


def variant(params: WebshopParams) -> str:
    """Name of the pages that `params` ask for: an example shows the same ones as the game does."""
    return f"{params.observation}{'+attributes' if params.attributes_page else ''}"


@cache
def played() -> dict[str, list[Demo]]:
    """Variant of the pages → the same purchases on them; `Demo.task_id` is "<source>/<number>" of the goal."""
    return msgspec.convert(read_json(Path(__file__).with_name("examples.json")), dict[str, list[Demo]])
