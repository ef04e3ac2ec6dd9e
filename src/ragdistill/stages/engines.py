"""What played each evaluation, kept beside its episodes; a report compares what one engine played in one precision.

The machine decides the engine, so results that moved between machines could hide a change of it. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ragdistill.errors import IdentityError
from ragdistill.llm import ChatModel
from ragdistill.records import read_json, write_json

ENGINE = "engine.json"
"""In the folder of each evaluation."""


def note(folder: Path, model: ChatModel) -> None:
    """Write what computes `model`'s replies: an engine of ours with precision and device, or a client's name."""
    write_json(folder / ENGINE, {"engine": getattr(model, "kind", type(model).__name__)})


def check_same(folders: Sequence[Path]) -> None:
    """`IdentityError` unless one engine played all of them; an evaluation that does not say which is passed over."""
    said = {f.name: read_json(f / ENGINE)["engine"] for f in folders if (f / ENGINE).is_file()}
    if len(set(said.values())) > 1:
        each = "; ".join(f"{name} by {engine}" for name, engine in said.items())
        raise IdentityError(
            f"Different engines played the policies that are compared ({each}); play all of them on one machine: "
            "`dvc repro --force --single-item evaluate evaluate_student`."
        )
