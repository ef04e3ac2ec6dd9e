"""One of the processes that train together: `python -m ragdistill.training.worker JOB`, under `accelerate launch`.

What to train stands in the job's file. Without the launcher it is the only process. It ends when the process that asked
for it does, however that ends: it hangs on a pipe, its standard input. Knows no stage.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import msgspec

from ragdistill.errors import MemoryFault, RagdistillError, lacks_memory
from ragdistill.files import storage_error
from ragdistill.llm import cpu_env
from ragdistill.params import LoraParams, RecipeParams, TrainingParams
from ragdistill.records import SftExample, write_json

FAILURE = "failure.json"
"""Beside the job: class and sentence of the designed error that ended it, of whichever process met one last."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What `train_lora` takes, as a file."""

    examples: list[SftExample]
    base: str
    out: str
    lora: LoraParams
    seed: int
    checkpoints: str
    every: int
    """Optimiser steps between checkpoints."""
    recipe: RecipeParams
    training: TrainingParams
    label: str
    """Begins each line of progress."""


def work(path: Path) -> int:
    """Train what the job at `path` says; 1 after a designed error, which is then beside it."""
    job = msgspec.json.decode(path.read_bytes(), type=Job)
    cpu_env.apply()
    import torch

    from ragdistill import progress
    from ragdistill.training.once import say
    from ragdistill.training.sft import train_lora

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    first = os.environ.get("RANK", "0") == "0"
    try:
        with progress.display(job.label) if first else nullcontext(), progress.bar("optimiser steps") as steps:
            train_lora(
                job.examples, Path(job.base), Path(job.out), job.lora, job.seed, Path(job.checkpoints), job.every,
                say(steps), recipe=job.recipe, training=job.training,
            )  # fmt: skip
    except Exception as e:
        said = _designed(e)
        if said is None:
            raise
        write_json(path.with_name(FAILURE), {"kind": type(said).__name__, "text": str(said)})
        return 1
    return 0


def _designed(error: Exception) -> RagdistillError | None:
    """`error` if it is one of ours, or what the machine refused; None for a bug."""
    if isinstance(error, RagdistillError):
        return error
    short = lacks_memory(error)
    return MemoryFault(short) if short else storage_error(error)


def end_with_the_pipe() -> None:
    """Kill this process when its standard input closes: who trains on alone writes where the next run does."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_the_pipe()
    raise SystemExit(work(Path(sys.argv[1])))
