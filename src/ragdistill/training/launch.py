"""Several processes train one adapter: `accelerate launch` with one of the files in configs/accelerate.

The processes end with this one, however it ends; what they saved is what the next run goes on from. Knows no trainer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from ragdistill import errors
from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.files import write_atomic
from ragdistill.params import TrainingParams
from ragdistill.records import read_json
from ragdistill.training.worker import FAILURE, Job

CONFIGS = Path("configs/accelerate")
"""Relative to the project's root, where stages run."""
WORKER = "ragdistill.training.worker"
"""Module that each process runs."""
_FILES = {"auto": "ddp.yaml", "fsdp": "fsdp.yaml", "deepspeed": "deepspeed.yaml"}
_GRACE = 60.0
"""Seconds the launcher gets to end after its processes."""


def command(training: TrainingParams, count: int, job: Path) -> list[str]:
    """The launcher's command line. `ConfigError` where the file of `training.launch` is missing."""
    config = CONFIGS / _FILES[training.launch]
    if not config.is_file():
        raise ConfigError(f"{config} is not there; run from the project's root, or set training.launch: one.")
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
        "--num_processes", str(count), "--main_process_port", "0", "-m", WORKER, str(job),
    ]  # fmt: skip


def train_together(job: Job, count: int, gpus: bool) -> None:
    """Train `job` in `count` processes, on a GPU each or all on the CPU; the adapter is then in `job.out`.

    Raises the designed error that ended the training; `EnvironmentFault` when the processes died without one.
    """
    env = os.environ if gpus else os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="sft-job-") as folder:
        path = Path(folder) / "job.json"
        write_atomic(path, msgspec.json.encode(job))
        launched = subprocess.Popen(command(job.training, count, path), env=env, stdin=subprocess.PIPE)
        try:
            status = launched.wait()
        finally:
            if launched.stdin:
                launched.stdin.close()  # on which the processes hang
            try:
                launched.wait(_GRACE)
            except subprocess.TimeoutExpired:  # what ended this wait, Ctrl-C for one, is what counts
                launched.kill()
                launched.wait()
        if path.with_name(FAILURE).is_file():
            said = read_json(path.with_name(FAILURE))
            raise getattr(errors, said["kind"])(said["text"])
    if status != 0:
        raise EnvironmentFault(
            f"Training in {count} processes ended with status {status} (see above); run again to go on from the last "
            "checkpoint, or set training.launch: one."
        )
