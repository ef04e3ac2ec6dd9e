"""Stage `track`: projects the result files into one MLflow run and registers the student as `challenger`.

Always runs, and is idempotent: the run is found by the hash of what it shows, the version by the adapter's hash. Where
neither what is shown nor the project's own store has changed since, a receipt says so before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from ragdistill.files import tree_sha256
from ragdistill.params import Params
from ragdistill.records import Trajectory, digest, read_json, read_jsonl, write_json
from ragdistill.stages.common import BANK, EVAL, RESULTS, SFT, STORE, STUDENTS, TASKS, run_stage
from ragdistill.stages.defaults import settle, student_name

STUDENT = "distilled"
"""The variant that is registered; its first training seed stands for it."""

INPUTS = {"tasks": TASKS, "hints": BANK.parent, "training": SFT, "evaluation": EVAL}
FILES = tuple(RESULTS / name for name in ("metrics.json", "timing.json", "report.html"))
RECEIPT = "projected.json"
"""In the project's own store: what the last projection showed and said."""
ELSEWHERE = ("ray.", "training.", "track.uri")
"""Beginnings of parameters that say where and how fast something runs, and change no result: no part of a lineage."""


def lineage(settings: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """Name of what is shown: the same results are the same run, wherever they were computed or are recorded."""
    return digest("lineage", {k: v for k, v in settings.items() if not k.startswith(ELSEWHERE)}, hashes)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys; sequences stay one value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def body(params: Params) -> str:
    params = settle(params)
    hashes = {name: tree_sha256(path) for name, path in INPUTS.items()}
    shown = {path.name: tree_sha256(path) for path in (RESULTS / "plots", STUDENTS)}
    shown |= {path.name: digest(path.read_text()) for path in FILES}
    state = digest("projected", msgspec.to_builtins(params), hashes, shown, os.environ.get("DVC_EXP_NAME", ""))
    if params.track.uri is None and (said := receipt(state)):
        return said
    said = project(params, hashes)
    if params.track.uri is None:
        write_json(STORE / RECEIPT, {"state": state, "store": stamp(), "said": said})
    return said


def stamp() -> list[int]:
    """What changes whenever MLflow writes to the project's own store; empty where there is none."""
    database = STORE / "mlflow.db"
    return [(found := database.stat()).st_size, found.st_mtime_ns] if database.exists() else []


def receipt(state: str) -> str:
    """What the last projection said, if it was of this state and nobody has written to the store since; else empty."""
    path = STORE / RECEIPT
    last = read_json(path) if path.exists() else {}
    return last["said"] if last and (last["state"], last["store"]) == (state, stamp()) else ""


def project(params: Params, hashes: Mapping[str, str]) -> str:
    """Show the results in MLflow and say where."""
    from ragdistill import registry, traces, tracking
    from ragdistill.report import headline
    from ragdistill.report.csvs import read_loss
    from ragdistill.report.metrics import order
    from ragdistill.report.words import UNRECORDED

    name, metrics = student_name(params), read_json(RESULTS / "metrics.json")
    students = [f"{v}-{s}" for v in params.sft.variants for s in params.sft.seeds]
    adapter = STUDENTS / f"{STUDENT}-{params.sft.seeds[0]}" if STUDENT in params.sft.variants else None
    settings = dict(flat(msgspec.to_builtins(params)))
    experiment = os.environ.get("DVC_EXP_NAME", "")
    tags = {"label": params.label, "engine": str(metrics.get("engine", UNRECORDED))}
    store = tracking.store_at(params.track.uri, STORE)
    done = registry.project(store, registry.Projection(
        experiment=params.track.experiment, lineage=lineage(settings, hashes), params=settings,
        name=headline.run_name(metrics), note=headline.note(metrics, "{run}/artifacts/report.html"),
        metrics=headline.shown(metrics),
        curves={f"loss/{s}": [(p.step, p.loss) for p in read_loss(STUDENTS / s / "loss.csv")] for s in students},
        datasets=[(name, str(path), hashes[name]) for name, path in INPUTS.items()],
        artifacts=[*FILES, RESULTS / "plots"],
        adapter=adapter, registered_model=name, tags=tags | ({"DVC_EXP_NAME": experiment} if experiment else {}),
    ))  # fmt: skip
    runs = {v: f"{v}-{params.sft.seeds[0]}" for v in params.sft.variants}
    runs |= {p: f"{p}-0" for p in params.evaluate.policies}
    played = {name: read_jsonl(EVAL / runs[name] / "trajectories.jsonl", Trajectory) for name in order(runs)}
    shown = traces.sample(played)
    traces.log_traces(store, done.run_id, shown)
    version = f"{name} version {done.version}" if done.version else "no adapter"
    return f"run {done.run_id} in {tracking.store_label(store)}, {len(shown)} games as traces, {version}"


if __name__ == "__main__":
    run_stage("track", body)
