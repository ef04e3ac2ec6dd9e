"""The MLflow projection of result files: a run, its adapter as a model version, the alias `challenger`.

Only it, `champions`, `tracking` and `traces` import mlflow (≈ 1–2 s), so nothing else imports it at module level.
Files and DVC stay the source of truth: a store (`tracking`: a directory or a server) that is lost is projected again.
This module knows no metric name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

# Usage statistics are sent over the network unless this is set before the import.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from ragdistill.errors import ConfigError, DataError
from ragdistill.files import tree_sha256
from ragdistill.tracking import Store, experiment, open_client, recorded, store_uri

LINEAGE_TAG, SHA_TAG = "ragdistill.lineage", "ragdistill.adapter_sha256"
CHALLENGER, CHAMPION = "challenger", "champion"
_LONGEST = 250
"""Characters of a metric's name in MLflow."""


@dataclass(frozen=True)
class Projected:
    """Where a projection landed; `version` is None without an adapter."""

    run_id: str
    version: str | None


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One pipeline state, as MLflow shall show it."""

    experiment: str
    name: str
    """Of the run, for people."""
    note: str
    """Markdown on the run's page; `{run}` in it becomes the run's address in MLflow's user interface."""
    lineage: str
    """Name of the inputs (e.g. a hash of `dvc.lock`); the same lineage updates the same run."""
    registered_model: str
    params: Mapping[str, object]
    """Flat. MLflow never changes a param: a value that drifts under one lineage goes to the tag `params.changed`."""
    metrics: Mapping[str, float]
    """Flat, finite."""
    curves: Mapping[str, Sequence[tuple[int, float]]]
    """Metric → (step, value) points."""
    datasets: Sequence[tuple[str, str, str]]
    """(name, path, sha256) of the inputs."""
    artifacts: Sequence[Path]
    """Files or directories copied into the run."""
    adapter: Path | None
    """Directory to register; None when nothing was trained."""
    tags: Mapping[str, str]
    """With `DVC_EXP_NAME` the alias `challenger` stays: an experiment, queued or not, displaces no `dvc repro`'s."""


@recorded
def project(store: Store, p: Projection) -> Projected:
    """Mirror `p` into one MLflow run, found or created by its lineage; idempotent.

    The adapter becomes a model version once for each content hash. `DataError` when its directory is empty or absent.
    """
    client = open_client(store, create=True)
    experiment_id = experiment(client, store, p.experiment)
    run_id = _run(client, experiment_id, p)
    _log_params(client, run_id, p.params)
    _log_metrics(client, run_id, p.metrics, p.curves)
    client.log_inputs(run_id, [_dataset(*d) for d in p.datasets])
    for path in p.artifacts:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), path.name)
        else:
            client.log_artifact(run_id, str(path))
    here = f"#/experiments/{experiment_id}/runs/{run_id}"
    version, tags = None, {**p.tags, MLFLOW_RUN_NOTE: p.note.replace("{run}", here)}
    if p.adapter is not None:
        version = tags["ragdistill.model_version"] = _register(client, experiment_id, run_id, p)
        if not tags.get("DVC_EXP_NAME"):
            client.set_registered_model_alias(p.registered_model, CHALLENGER, version)
    client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])
    client.set_terminated(run_id, "FINISHED")
    return Projected(run_id, version)


@recorded
def download(store: Store, name: str, alias: str, dest: Path) -> Path:
    """Copy the adapter behind `alias` into the new directory `dest` and return it.

    `ConfigError` without such an alias or with files in `dest`, `DataError` when the stored files were altered.
    """
    client = open_client(store)
    version = require(client, name, alias)
    if dest.exists() and any(dest.iterdir()):
        raise ConfigError(f"{dest} is not empty; name a new directory.")
    with tempfile.TemporaryDirectory() as tmp:
        # By address: MLflow would look a `models:/` name up in the global store, whatever the client's.
        address = client.get_model_version_download_uri(name, str(version.version))
        got = Path(download_artifacts(artifact_uri=address, dst_path=tmp, tracking_uri=store_uri(store)))
        if version.tags.get(SHA_TAG) != tree_sha256(got):
            raise DataError(f"Version {version.version} of {name} changed in the store; project it again.")
        shutil.copytree(got, dest, dirs_exist_ok=True)
    return dest


def _run(client: MlflowClient, experiment_id: str, p: Projection) -> str:
    if not p.lineage or "'" in p.lineage:
        raise ConfigError(f"Lineage {p.lineage!r} must be a non-empty name without quotes.")
    found = client.search_runs([experiment_id], f"tags.`{LINEAGE_TAG}` = '{p.lineage}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING", name=p.name)
        return found[0].info.run_id
    return client.create_run(experiment_id, tags={LINEAGE_TAG: p.lineage}, run_name=p.name).info.run_id


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, object]) -> None:
    stored = client.get_run(run_id).data.params
    wanted = {k: str(v) for k, v in params.items()}
    new = [Param(k, v) for k, v in wanted.items() if k not in stored]
    for i in range(0, len(new), 100):  # MLflow's limit of params in one request
        client.log_batch(run_id, params=new[i : i + 100])
    changed = {k: v for k, v in wanted.items() if k in stored and stored[k] != v}
    if changed:
        client.set_tag(run_id, "params.changed", json.dumps(changed, sort_keys=True))


def metric_name(name: str) -> str:
    """`name` as MLflow takes it; parts of it (a type of task) are an environment's own words."""
    parts = (re.sub(r"[^\w .:-]", "_", part) for part in name.split("/"))
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)[:_LONGEST].rstrip("/")


def _log_metrics(
    client: MlflowClient, run_id: str, metrics: Mapping[str, float], curves: Mapping[str, Sequence[tuple[int, float]]]
) -> None:
    metrics = {metric_name(k): v for k, v in metrics.items()}
    now = int(datetime.now(UTC).timestamp() * 1000)
    stored = client.get_run(run_id).data.metrics
    # A metric keeps its history: an unchanged number is not logged again, so reprojecting adds nothing.
    points = [Metric(k, float(v), now, 0) for k, v in metrics.items() if stored.get(k) != float(v)]
    for name, curve in curves.items():
        known = {(m.step, m.value) for m in client.get_metric_history(run_id, name)} if name in stored else set()
        points += [Metric(name, float(v), now, step) for step, v in curve if (step, float(v)) not in known]
    for i in range(0, len(points), 1000):  # MLflow's limit of metrics in one request
        client.log_batch(run_id, metrics=points[i : i + 1000])


def _dataset(name: str, path: str, sha: str) -> DatasetInput:
    source, profile = json.dumps({"uri": path}), json.dumps({"sha256": sha})
    # 36 characters are MLflow's limit of a digest; the whole hash stands in the profile.
    dataset = Dataset(name=name, digest=sha[:36], source_type="local", source=source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", name)])


def _register(client: MlflowClient, experiment_id: str, run_id: str, p: Projection) -> str:
    """Upload the adapter as a logged model and register it, unless its hash is already registered."""
    adapter, name = p.adapter, p.registered_model
    if adapter is None or not adapter.is_dir() or not any(adapter.iterdir()):
        raise DataError(f"Adapter directory {adapter} is absent or empty; run the stage that trains it.")
    sha = tree_sha256(adapter)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(SHA_TAG) == sha:
            return str(version.version)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    tags = {SHA_TAG: sha}
    model = client.create_logged_model(experiment_id, name, run_id, tags, model_type="lora-adapter")
    client.log_model_artifacts(model.model_id, str(adapter))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    # The artifact location, not `models:/m-…`: MLflow resolves the latter in the global store, whatever the client's.
    version = client.create_model_version(name, model.artifact_location, run_id, tags, model_id=model.model_id)
    return str(version.version)


def require(client: MlflowClient, name: str, alias: str) -> ModelVersion:
    """The version behind `alias`; `ConfigError` when there is none."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException:
        raise ConfigError(f"No version of {name} is called {alias}; run `dvc repro` or promote one.") from None


def now() -> str:
    """The time in UTC, as it stands in tags."""
    return datetime.now(UTC).isoformat(timespec="seconds")
