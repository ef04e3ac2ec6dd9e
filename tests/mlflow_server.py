"""A real `mlflow server` on this machine's loopback, for tests of its API and of what a person sees there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from tests.ray_cluster import HOST, free_port, kill


@contextmanager
def serve(store: Path) -> Iterator[str]:
    """The address of a server whose records are `store`/mlflow.db and `store`/artifacts; ended afterwards."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--artifacts-destination", str(store / "artifacts"),
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (store / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=store, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (store / "log").read_text()
            try:
                urlopen(f"http://{HOST}:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://{HOST}:{port}"
    finally:
        kill(process)
