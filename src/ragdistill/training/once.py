"""Train once: an adapter that was already trained from the same data, base and settings is taken from the cache.

DVC reruns a stage whenever a file it depends on changes, be it by a comment; this keeps such a rerun free. The key
holds everything that decides the result, and no code: a change of the trainer's behaviour raises `TRAINER_VERSION`.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from ragdistill import progress
from ragdistill.llm.weights import BASE_IDENTITY, model_fingerprint
from ragdistill.params import LoraParams, RecipeParams, TrainingParams
from ragdistill.records import SftExample, digest
from ragdistill.training.encode import OURS
from ragdistill.training.hardware import AUTO, processes, unheeded
from ragdistill.training.launch import train_together
from ragdistill.training.sft import SftResult, recipe_key, train_lora
from ragdistill.training.worker import Job

TRAINER_VERSION = "sft-1"


def train_once(  # noqa: PLR0913 - what is trained, on what, where to, and how
    examples: Sequence[SftExample],
    base_dir: Path,
    out_dir: Path,
    lora: LoraParams,
    seed: int,
    cache: Path,
    every: int,
    *,
    recipe: RecipeParams = OURS,
    training: TrainingParams = AUTO,
) -> SftResult:
    """`train_lora` with checkpoints and finished adapters under `cache`; the adapter ends up in `out_dir`.

    `every`: optimiser steps between checkpoints. `training` says in how many processes, and is not part of the key.
    """
    chats = [[(m.role, m.content) for m in e.messages] for e in examples]
    key = digest("adapter", TRAINER_VERSION, model_fingerprint(base_dir), chats, lora, seed, *recipe_key(recipe))
    kept = cache / "adapters" / key
    with _alone(cache / "locks" / key, out_dir.name), progress.bar("optimiser steps") as steps:
        known = (kept / BASE_IDENTITY).is_file()  # written last
        if not known:
            label, checkpoints, count = out_dir.name, cache / "checkpoints", processes(training, recipe.quantize)
            if note := unheeded(training, count):
                print(f"{label}: {note}", file=sys.stderr, flush=True)
            if count == 1:
                train_lora(
                    examples, base_dir, kept, lora, seed, checkpoints, every, say(steps), recipe=recipe,
                    training=training,
                )  # fmt: skip
            else:
                job = Job(
                    examples=list(examples), base=str(base_dir), out=str(kept), lora=lora, seed=seed, label=label,
                    checkpoints=str(checkpoints), every=every, recipe=recipe, training=training,
                )  # fmt: skip
                steps.hidden = True  # the processes show their own
                train_together(job, count, torch.cuda.is_available())
        shutil.rmtree(out_dir, ignore_errors=True)
        shutil.copytree(kept, out_dir)
        result = msgspec.json.decode((out_dir / "training.json").read_bytes(), type=SftResult)
        steps.at(result.steps, result.steps if known else steps.replayed)
    return result


@contextmanager
def _alone(lock: Path, label: str) -> Iterator[None]:
    """Experiments that run at once share checkpoints and adapters: one trains, the others take what it made.

    The kernel lets go of the lock when the process ends, however it does.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{label}: another run trains this adapter; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(bar: progress.Bar) -> Callable[[int, int, float, float], None]:
    """Progress of a training; the steps before the first that is reported were done by an earlier run."""

    def report(step: int, total: int, loss: float, tokens_per_second: float) -> None:
        if bar.total is None:
            bar.total, bar.replayed = total, step - 1
        bar.at(step, bar.replayed, f"loss {loss:.3f}, {tokens_per_second:.0f} tokens/s")

    return report
