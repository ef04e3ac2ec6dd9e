"""Where MLflow's records are: in a directory of this project, or on a tracking server (`track.uri`).

A directory holds `mlflow.db` (sqlite) and `artifacts/`; look at it with
`mlflow ui --backend-store-uri sqlite:///<directory>/mlflow.db`. A server is asked with what MLflow itself reads from
the environment (`MLFLOW_TRACKING_USERNAME` and `_PASSWORD`, or `MLFLOW_TRACKING_TOKEN`); no credential stands in a
parameter, a file or a message of this project. This module knows nothing of what is recorded.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

# Usage statistics are sent over the network unless this is set before the import.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow's own seven retries keep a wrong address waiting for minutes; four take half a minute.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
# A stage says its one line itself.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ragdistill.checks import TRACKING_REMEDY, address_fault
from ragdistill.errors import ConfigError, DataError, EnvironmentFault, lacks_memory
from ragdistill.files import storage_error, write_atomic
from ragdistill.llm.keys import clean

P = ParamSpec("P")
T = TypeVar("T")
Store = Path | str
"""A directory, or a server's http(s) address."""
VARIABLE = "MLFLOW_TRACKING_URI"
SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
"""Variables whose values no message repeats, whatever a server says."""
_SQLITE = b"SQLite format 3\0"
"""How every sqlite file begins."""


def store_at(uri: str | None, local: Path) -> Store:
    """The store that `track.uri` means: `local`, or a server; "env" is the one that `MLFLOW_TRACKING_URI` names.

    The variable alone changes nothing: many have it set for other projects. `ConfigError` when it is no plain address.
    """
    if uri is None:
        return local
    named = os.environ.get(VARIABLE, "") if uri == "env" else uri
    if fault := address_fault(named):
        raise ConfigError(
            f"{f'track.uri is env, but {VARIABLE}' if uri == 'env' else 'track.uri'} {fault}; {TRACKING_REMEDY}"
        )
    return named.rstrip("/")


def store_uri(store: Store) -> str:
    """MLflow's address of the store."""
    return store if isinstance(store, str) else f"sqlite:///{store.resolve() / 'mlflow.db'}"


def store_label(store: Store) -> str:
    """The store in a message."""
    return store if isinstance(store, str) else f"{store.name}/mlflow.db"


def open_client(store: Store, create: bool = False) -> MlflowClient:
    """A client of the store; `create` makes a directory that does not exist yet.

    `ConfigError` when it is neither there nor to be made, or when the server is silent or refuses; `DataError` when
    its file is no database; `StorageError` when the disk refuses.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a new store prints ~60 migration lines otherwise
    logging.getLogger("mlflow.store.model_registry").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints the traceback of what it raises
    if isinstance(store, Path):
        if create:
            _make(store)
        elif not (store / "mlflow.db").exists():
            raise ConfigError(f"{store} holds no MLflow store; run `dvc repro track` first.")
        _check(store)
    client = MlflowClient(tracking_uri=store_uri(store), registry_uri=store_uri(store))
    if isinstance(store, str):
        _ask(client, store)
    return client


def _check(store: Path) -> None:
    """Refuse a file that is no sqlite database, on which MLflow fails with a traceback. An empty one is a new one."""
    with (store / "mlflow.db").open("rb") as f:
        header = f.read(len(_SQLITE))
    if header not in (b"", _SQLITE):
        raise DataError(f"{store_label(store)} is no MLflow store; move it away and run `dvc repro track`.")


def _make(store: Path) -> None:
    """An empty store in the directory, unless there is one; whole or not at all.

    MLflow makes it in dozens of steps and cannot go on from the middle: broken off by a kill or a full disk in its
    place, it could never be opened again.
    """
    store.mkdir(parents=True, exist_ok=True)
    if (store / "mlflow.db").exists():
        return
    with (store / ".lock").open("w") as lock, tempfile.TemporaryDirectory(prefix="mlflow-") as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # experiments that run at once share the store
        if not (store / "mlflow.db").exists():
            MlflowClient(tracking_uri=store_uri(Path(scratch))).search_experiments(max_results=1)
            write_atomic(store / "mlflow.db", (Path(scratch) / "mlflow.db").read_bytes())


def experiment(client: MlflowClient, store: Store, name: str) -> str:
    """Id of the experiment `name`, made if need be. A server says itself where artifacts go."""
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    # Left out, the location would resolve from the current directory even with an absolute sqlite URI.
    place = (store.resolve() / "artifacts" / name).as_uri() if isinstance(store, Path) else None
    return client.create_experiment(name, artifact_location=place)


def recorded(asked: Callable[Concatenate[Store, P], T]) -> Callable[Concatenate[Store, P], T]:
    """Make a failure of MLflow in the middle of `asked`, whose first argument is the store, an `EnvironmentFault`.

    What the machine refused (disk, memory) is left to whoever knows the remedy.
    """

    @wraps(asked)
    def ask(store: Store, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return asked(store, *args, **kwargs)
        except (MlflowException, OSError) as e:
            if storage_error(e) or lacks_memory(e) or (isinstance(e, OSError) and isinstance(store, Path)):
                raise
            why = str(e)
            for name in SECRETS:
                why = clean(why, os.environ.get(name, "").strip())
            raise EnvironmentFault(
                f"MLflow failed at {store_label(store)} ({why.rstrip('.')}); run again once it answers: what is "
                "recorded already is found, not recorded twice."
            ) from None

    return ask


def _ask(client: MlflowClient, server: str) -> None:
    """One cheap question, so that what is wrong with a server is said once and plainly."""
    try:
        client.search_experiments(max_results=1)
    except MlflowException as e:
        if e.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise ConfigError(
                f"The MLflow server {server} refuses; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN, in the environment."
            ) from None
        raise ConfigError(
            f"No MLflow server answers at {server}; start it (`mlflow server`), correct track.uri, or set it to null."
        ) from None
