"""Tables for `dvc plots`: policies, task kinds and training losses as CSV. Knows no statistics and no DVC."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragdistill.errors import DataError
from ragdistill.files import write_atomic
from ragdistill.report.metrics import order
from ragdistill.report.table import task_sets

_POLICY_COLUMNS = (
    "n", "success", "success_lo", "success_hi", "success_room_lo", "success_room_hi", "score", "score_lo", "score_hi",
    "steps", "steps_lo", "steps_hi", "tokens_billed", "tokens_billed_lo", "tokens_billed_hi", "tokens_computed",
    "tokens_computed_lo", "tokens_computed_hi", "tokens_completion", "invalid", "seconds", "seconds_lo", "seconds_hi",
    "infra",
)  # fmt: skip


@dataclass(frozen=True)
class LossPoint:
    """One optimiser step of a training run."""

    step: int
    epoch: float
    loss: float
    lr: float
    tokens_per_second: float


def read_loss(path: Path) -> list[LossPoint]:
    """Read a trainer's `loss.csv`; `DataError` names the file and line of a damaged row."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run the stage that trains it.") from None
    out: list[LossPoint] = []
    for line, row in enumerate(rows, 2):
        try:
            floats = [float(row[k]) for k in ("epoch", "loss", "lr", "tokens_per_second")]
            out.append(LossPoint(int(row["step"]), *floats))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}:{line} is not step,epoch,loss,lr,tokens_per_second; train again.") from None
    return out


def write_csvs(directory: Path, metrics: Mapping[str, Any], losses: Mapping[str, Sequence[LossPoint]]) -> list[Path]:
    """Write `policies.csv`, `by_kind.csv` and `loss.csv` into `directory`; returns their paths.

    Args:
        metrics: of `compute_metrics`.
        losses: adapter name → its curve.
    """
    policies = [
        {"policy": name, "tasks": tasks, **{c: row.get(c, "") for c in _POLICY_COLUMNS}}
        for tasks, part in task_sets(metrics).items()
        for name, row in ((n, part["policies"][n]) for n in order(part["policies"]))
    ]
    kinds = [
        {"kind": kind, "policy": name, **{c: part[name][c] for c in ("n", "success", "lo", "hi")}}
        for kind, part in sorted(metrics["by_kind"].items())
        for name in order(part)
    ]
    curves = [{"adapter": name, **vars(point)} for name, curve in losses.items() for point in curve]
    return [
        _write(directory / "policies.csv", ("policy", "tasks", *_POLICY_COLUMNS), policies),
        _write(directory / "by_kind.csv", ("kind", "policy", "n", "success", "lo", "hi"), kinds),
        _write(directory / "loss.csv", ("adapter", *LossPoint.__dataclass_fields__), curves),
    ]


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, out.getvalue().encode())
    return path
