"""What a run made, without what the clock decides, to be compared with an undisturbed one's. Knows no fault."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from ragdistill.commands.smoke import override
from ragdistill.records import Trajectory, read_jsonl, write_json
from tests.faults.project import STUDENT, journaled, weights
from tests.test_mlflow_page import numbers


def played(project: Path) -> list[Trajectory]:
    """Every trajectory file of the project, times aside."""
    files = [project / "data/rollouts.jsonl", *sorted(project.glob("data/teach/*.jsonl"))]
    files += sorted(project.glob("results/eval/*/trajectories.jsonl"))
    return [msgspec.structs.replace(t, seconds=0.0) for f in files for t in read_jsonl(f, Trajectory)]


def metrics(project: Path) -> Any:
    """`results/metrics.json` without what the clock decides; None when it is not made."""
    path = project / "results/metrics.json"
    return _timeless(json.loads(path.read_text())) if path.exists() else None


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if "second" not in k and "latency" not in k}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def assert_same(project: Path, reference: Path, reported: bool = True) -> int:
    """Same episodes, each once, same weights of base and students, same metrics; returns the number of episodes.

    Where the stage `report` did not run (not `reported`) there are no metrics, which the episodes would decide.
    """
    found, expected = played(project), played(reference)
    assert [t.id for t in found] == [t.id for t in expected]
    assert found == expected
    assert set(journaled(project)) == set(journaled(reference))
    assert weights(project) == weights(reference)
    assert metrics(project) == metrics(reference)
    assert (metrics(reference) is not None) == reported
    return len(found)


def wipe(project: Path) -> None:
    """Everything a run makes is gone; translated games stay, they only save time."""
    made = ("dvc.lock", "data", "models", "results", "mlruns", ".dvc/cache", ".dvc/tmp")
    kept = ("journal", "adapters", "checkpoints", "coldstart", "timing")
    for name in (*made, *(f".cache/{n}" for n in kept)):
        path = project / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def tracked(small: Path, where: Path) -> Path:
    """A copy of the small project with results that `track` can project."""
    shutil.copytree(small, where, symlinks=True)
    override(where / "params.yaml", ["sft.variants=[distilled]", "evaluate.policies=[base]"])
    for name in ("metrics.json", "timing.json", "report.html", "plots/a.json"):
        write_json(where / "results" / name, numbers() if name == "metrics.json" else {})
    student = where / "models/students" / STUDENT
    student.mkdir(parents=True)
    (student / "adapter_model.safetensors").write_bytes(bytes(100_000))
    (student / "loss.csv").write_text("step,epoch,loss,lr,tokens_per_second\n1,1.0,0.5,0.1,9\n")
    for policy in ("base-0", STUDENT):
        (where / "results/eval" / policy).mkdir(parents=True)
        shutil.copy(where / "data/rollouts.jsonl", where / "results/eval" / policy / "trajectories.jsonl")
    return where


def registered(project: Path) -> list[int]:
    """Runs and model versions that MLflow holds."""
    with closing(sqlite3.connect(project / "mlruns/mlflow.db")) as store:
        return [store.execute(f"select count(*) from {table}").fetchone()[0] for table in ("runs", "model_versions")]
