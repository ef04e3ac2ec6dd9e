"""A small scripted project that real stages and `dvc repro` run in, and its processes. Knows no test."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ragdistill.commands.smoke import copy_project, override
from ragdistill.journal import Journal
from ragdistill.llm.weights import adapter_fingerprint, model_fingerprint
from ragdistill.records import Trajectory

SMALL = """
label=test
model.base=tiny
model.engine=scripted
model.script=tests.scripted_policy:play
model.concurrency=4
env.max_steps=20
env.workers=1
tasks.train=6
tasks.dev=0
tasks.test=3
evaluate.primary=[]
coldstart.enabled=false
rollouts.attempts=4
hints.min_support=1
strip.max_invalid=null
report.bootstrap=100
"""
"""Six training games and 24 episodes before `strip`, no training: seconds."""
LAST = "strip"
"""The last stage of the small project that is run."""


LEARNING = """
sft.checkpoint_steps=2
sft.lora.epochs=4
coldstart.enabled=true
coldstart.lora.epochs=4
"""
"""Eight optimiser steps on the small project's two examples, a checkpoint every other one."""
LORA = ("r=4", "batch=1", "max_tokens=32000")
STUDENT = "distilled-0"
TRAINED = re.compile(r"^(\S+): step (\d+)/(\d+), loss")
"""A line of progress: label, step, steps."""


SAYING = {
    "say(steps)": "say(steps, out_dir.name)",
    "def say(bar: progress.Bar)": "def say(bar: progress.Bar, label: str)",
    "        if bar.total is None:\n": (
        "        import sys\n"
        '        print(f"{label}: step {step}/{total}, loss", file=sys.stderr, flush=True)\n'
        "        if bar.total is None:\n"
    ),
}
"""What a copy's `training.once` says instead: a line for every optimiser step, whatever the display does."""


def lines_of(overrides: str) -> list[str]:
    """The overrides of a text block."""
    return [line for line in overrides.splitlines() if line]


def lay_out(where: Path, overrides: str = SMALL) -> Path:
    """A copy of the project with a toy model and small numbers, which says every optimiser step; nothing is run."""
    from tests.llm_toys import toy_model  # imports torch; worker processes that import this module do without

    copy_project(where)
    toy_model(where / "tiny")
    override(where / "params.yaml", lines_of(overrides))
    once = where / "src/ragdistill/training/once.py"
    text = once.read_text()
    for found, wanted in SAYING.items():
        assert text.count(found) == 1, found
        text = text.replace(found, wanted)
    once.write_text(text)
    return where


def make_project(where: Path, overrides: str = SMALL, target: Sequence[str] = (LAST,)) -> Path:
    """`lay_out`, then `dvc repro TARGET`."""
    done = run(lay_out(where, overrides), "-m", "dvc", "repro", *target)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return where


def learner(project: Path, where: Path) -> Path:
    """A copy of the finished small project that can train: the student, and as a cold start on the same chats."""
    shutil.copytree(project, where, symlinks=True)
    lora = [f"{stage}.lora.{change}" for stage in ("coldstart", "sft") for change in LORA]
    override(where / "params.yaml", [*lines_of(LEARNING), *lora])
    shutil.copy(where / f"data/sft/{STUDENT.partition('-')[0]}.jsonl", where / "data/demos.jsonl")
    return where


def trained(text: str) -> list[tuple[str, int, int]]:
    """(label, step, steps) of each optimiser step in a stage's output."""
    return [(m[1], int(m[2]), int(m[3])) for line in text.splitlines() if (m := TRAINED.match(line))]


def weights(project: Path) -> dict[str, str]:
    """Fingerprint of every model that a run made: the base and all students."""
    students = [p.parent for p in sorted(project.glob("models/students/*/adapter_config.json"))]
    found = {p.name: adapter_fingerprint(p) for p in students}
    return found | {"base": model_fingerprint(project / "models/base")}


def fresh(project: Path, where: Path) -> Path:
    """A copy of a finished project that has lost its episodes: only tasks, model and translated games are left."""
    shutil.copytree(project, where, symlinks=True)
    outputs = ("data/rollouts.jsonl", "data/hints", "data/teach/hints.jsonl", "data/sft")
    for lost in (*outputs, ".cache/journal", ".cache/timing", ".dvc/cache", ".dvc/tmp"):
        path = where / lost
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return where


def environment(**extra: str) -> dict[str, str]:
    """As a person's shell has it: nothing of an outer DVC run, one copy's own code."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "RAGDISTILL_"))}
    path = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env | {"PATH": path, "PYTHONPATH": "src", "CI": "1", "DVC_NO_ANALYTICS": "1"} | extra


def run(where: Path, *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python ARGS` in `where`, to its end."""
    return subprocess.run(
        [sys.executable, *args], cwd=where, env=environment(**extra), capture_output=True, text=True, check=False
    )


def in_namespace(how: Sequence[str], where: Path, script: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in mounts of its own, begun by the command `how`; they vanish with it."""
    return subprocess.run(
        [*how, "sh", "-c", script], cwd=where, env=environment(**extra), capture_output=True, text=True, check=False
    )


@contextmanager
def group(where: Path, *args: str, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """`python ARGS` as the leader of a process group of its own, as a terminal starts it; none of it is left over."""
    with subprocess.Popen(
        [sys.executable, *args], cwd=where, env=environment(**extra), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as leader:  # fmt: skip
        try:
            yield leader
        finally:
            if members(leader.pid):
                os.killpg(leader.pid, signal.SIGKILL)


def members(session: int) -> list[int]:
    """Live processes of a session, zombies aside."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def orphans(session: int, patience: float = 5.0) -> list[int]:
    """Processes of a session that outlive its leader by more than `patience` seconds."""
    end = time.monotonic() + patience
    while (left := members(session)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def entries(where: Path) -> list[Path]:
    """Journal files of finished episodes."""
    return sorted(where.glob(".cache/journal/episodes/*/*.json"))


def journaled(where: Path) -> dict[str, Trajectory]:
    """Every entry of the journal, by key; each must read back."""
    journal = Journal(where / ".cache/journal/episodes", Trajectory)
    found = {p.stem: journal.get(p.stem) for p in entries(where)}
    assert journal.damaged == 0
    return {key: t for key, t in found.items() if t is not None}
