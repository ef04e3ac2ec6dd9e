"""What every stage shares: where files are, parameters, timing, designed errors, the matrix item.

Knows nothing of what is in the files.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ragdistill import progress, timing
from ragdistill.errors import MemoryFault, RagdistillError, memory_fault
from ragdistill.files import storage_error
from ragdistill.journal import project_root
from ragdistill.params import Params, load_params
from ragdistill.timing import Timing

if TYPE_CHECKING:
    from ragdistill.training.sft import SftResult

IDENTITY = Path("data/identity.json")
TASKS = Path("data/tasks")
GAMES = Path("data/games")
DEMOS = Path("data/demos.jsonl")
RAW = Path("models/raw")
TEACHER = Path("models/teacher")
BASE = Path("models/base")
ROLLOUTS = Path("data/rollouts.jsonl")
BANK = Path("data/hints/bank.jsonl")
LIFT = Path("data/lift")
TEACH = Path("data/teach")
SFT = Path("data/sft")
STUDENTS = Path("models/students")
EVAL = Path("results/eval")
ENGINE = "engine.json"
"""Beside an evaluation's episodes: what played them (a `llm.Engine`)."""
RESULTS = Path("results")
TIMING = Path(".cache/timing")
"""Of this workspace, also where `RAGDISTILL_CACHE` shares the rest."""
STORE = project_root() / "mlruns"
"""MLflow store; of the main workspace, also for a queued experiment."""


TRAINING = ("coldstart", "sft")
"""Stages that train: parameter sections of the same name hold their `lora`."""
PLAYING = ("rollouts", "hints", "lift", "teach", "evaluate")
"""Stages with a model that answers `model.concurrency` calls at once."""


def run_stage(name: str, body: Callable[[Params], str]) -> None:
    """Load params, time `body`, show its progress, print its one line of what was done and what that took.

    A designed error, a disk that refuses or memory that is short exits 1 with one line and without a traceback; Ctrl-C
    exits 130.
    """
    started = time.monotonic()
    quiet_libraries()
    try:
        with progress.display(name) as work:
            done = body(load_params())
        seconds = round(time.monotonic() - started, 1)
        timing.note(TIMING / f"{name}.json", name, seconds, work.share, work.done)
        took = f"{seconds:.0f} s, {work.words()}" if work.words() else f"{seconds:.0f} s"
        print(f"{name}: {done} ({took})", flush=True)
    except Exception as e:
        said = plainly(e, name)
        if said is None:
            raise
        _leave(f"{name}: {said}", 1)
    except KeyboardInterrupt as e:
        _leave(f"{name}: interrupted; {str(e) or 'finished work is kept'}, run again to go on.", 130)


def plainly(error: Exception, stage: str) -> RagdistillError | None:
    """`error` of `stage` as one sentence; None for a bug, which keeps its traceback."""
    if isinstance(error, RagdistillError) and not isinstance(error, MemoryFault):
        return error
    kind = stage.partition("@")[0]
    relief = "lower model.concurrency" if kind in PLAYING else "end other programs"
    if kind in TRAINING:
        relief = f"set training.checkpointing to true or lower {kind}.lora.batch"
    return memory_fault(error, relief) or storage_error(error)


def _leave(line: str, status: int) -> NoReturn:
    """Say one line and exit; a second Ctrl-C must not disturb what still has to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def quiet_libraries() -> None:
    """Keep other people's progress bars and deprecations out of the log; call before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def read_timing() -> dict[str, Timing]:
    """Stage → wall time of its runs in this workspace (a stage restored from DVC's cache has none)."""
    return timing.collect(TIMING)


def link_tree(source: Path, dest: Path) -> None:
    """Copy a directory, by hard links where the file system allows; what symbolic links lead to comes as files."""

    def hard_link(file: str, to: str) -> None:
        os.link(os.path.realpath(file), to)  # the Hugging Face hub's snapshots are relative symbolic links

    shutil.rmtree(dest, ignore_errors=True)
    try:
        shutil.copytree(source, dest, copy_function=hard_link)
    except OSError:
        shutil.rmtree(dest, ignore_errors=True)
        shutil.copytree(source, dest)


def training_line(result: SftResult) -> str:
    """What a training was, in one phrase."""
    cut = result.recipe is not None and result.recipe.too_long == "cut"
    what = f"too long and cut, {result.mute} left out: nothing to learn was left" if cut else "too long and left out"
    return (
        f"{result.examples} examples ({result.too_long} {what}), "
        f"{result.tokens * result.lora.epochs:,} tokens trained in {result.steps} steps at "
        f"{result.tokens_per_second:.0f} tokens/s, final loss {result.final_loss:.3f}"
    )


def item() -> str:
    """The matrix item of this stage: the last command-line argument."""
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python -m {sys.argv[0]} ITEM (dvc.yaml passes it)")
    return sys.argv[1]
