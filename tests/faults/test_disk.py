"""A disk that is full, read-only or out of quota: one sentence, exit 1, nothing finished is lost, and then it goes on.

The full disk is a real one: a tmpfs of a few kilobytes in a mount namespace of the test's own (skips where neither a
user namespace nor root may mount). Read-only is a bind mount, because root, as which tests may run, ignores mode bits;
anybody else gets a directory without write permission too.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Figure
from tests.faults.outcome import registered, tracked
from tests.faults.project import STUDENT, fresh, in_namespace, journaled, learner, run, weights

STAGE = f"{sys.executable} -m ragdistill.stages"


def sentences(err: str, stage: str) -> list[str]:
    """What the runs of `stage` said at last, one line each; there must be no traceback."""
    assert "Traceback" not in err, err
    return [line for line in err.splitlines() if line.startswith(f"{stage}: ")]


@pytest.mark.timeout(300)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_once_there_is_room(
    small: Path, tmp_path: Path, figure: Figure, mounting: tuple[str, ...]
) -> None:
    project = fresh(small, tmp_path / "project")
    (project / ".cache/journal").mkdir()
    done = in_namespace(
        mounting, project,
        f"""mount -t tmpfs -o size=64k tmpfs .cache/journal
        {STAGE}.rollouts; echo status $?
        find .cache/journal -name '*.json' | wc -l; find .cache/journal -name '*.tmp' | wc -l
        mount -o remount,size=64m .cache/journal
        {STAGE}.rollouts; echo status $?
        cp -r .cache/journal .cache/kept""",
    )  # fmt: skip
    first, kept, torn, second = re.findall(r"^(?:status )?(\d+)$", done.stdout, re.MULTILINE)
    assert (first, torn, second) == ("1", "0", "0"), done.stderr
    assert 0 < int(kept) < 24
    (line,) = sentences(done.stderr, "rollouts")
    assert re.search(r"cannot be written \(No space left on device\); free some space and run again, finished", line)
    assert f"{kept} of 24 episodes from the cache)" in done.stdout
    (project / ".cache/journal").rmdir()
    (project / ".cache/kept").rename(project / ".cache/journal")
    assert len(journaled(project)) == 24
    figure("disk full (tmpfs 64 KiB)", f"exit 1, 1 sentence, 0 torn files; {kept} of 24 kept, goes on after remount")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_disk_that_fills_in_training_is_one_sentence_wherever_and_the_adapter_is_the_same(
    small: Path, learnt: dict[str, str], tmp_path: Path, figure: Figure, mounting: tuple[str, ...]
) -> None:
    """Checkpoints are written by transformers, the adapter by safetensors, the student copied: none says it alike."""
    project, places = learner(small, tmp_path / "project"), (".cache/checkpoints", ".cache/adapters", "models/students")
    for place in places:
        (project / place).mkdir(parents=True, exist_ok=True)
    mounts = "\n".join(f"mount -t tmpfs -o size=16k tmpfs {p}" for p in places)
    runs = "\n".join(f"{STAGE}.sft {STUDENT}; echo status $?\nmount -o remount,size=64m {p}" for p in places)
    done = in_namespace(
        mounting, project,
        f"{mounts}\n{runs}\n{STAGE}.sft {STUDENT}; echo status $?\ncp -r models/students models/kept",
    )  # fmt: skip
    assert re.findall(r"^status (\d+)$", done.stdout, re.MULTILINE) == ["1", "1", "1", "0"], done.stderr
    said = sentences(done.stderr, f"sft@{STUDENT}")
    assert len(said) == 3, done.stderr
    assert all("cannot be written (" in line and "; free some space and run again" in line for line in said), said
    shutil.rmtree(project / "models/students")
    (project / "models/kept").rename(project / "models/students")
    assert weights(project)[STUDENT] == learnt[STUDENT]
    figure("disk full in training", "at checkpoint, adapter, student: exit 1, 1 sentence; then the same adapter")


@pytest.mark.timeout(300)
def test_a_disk_that_fills_under_mlflow_is_one_sentence_and_nothing_is_registered_twice(
    small: Path, tmp_path: Path, figure: Figure, mounting: tuple[str, ...]
) -> None:
    """While the store is made, while numbers go into it, and while files are copied beside it."""
    project = tracked(small, tmp_path / "project")
    (project / "mlruns").mkdir()
    stage = f"{STAGE}.track; echo status $?"
    done = in_namespace(
        mounting, project,
        f"""mount -t tmpfs -o size=64k tmpfs mlruns
        {stage}
        mount -o remount,size=64m mlruns
        {stage}
        dd if=/dev/zero of=mlruns/filler bs=1k 2>/dev/null
        sed -i 's/"steps": [0-9.]*/"steps": 99.5/g' results/metrics.json
        {stage}
        rm mlruns/filler
        {stage}
        cp -r mlruns kept""",
    )  # fmt: skip
    assert re.findall(r"^status (\d+)$", done.stdout, re.MULTILINE) == ["1", "0", "1", "0"], done.stderr
    said = sentences(done.stderr, "track")
    assert len(said) == 2 and all("cannot be written (" in line and "; free some space" in line for line in said), said
    (project / "mlruns").rmdir()
    (project / "kept").rename(project / "mlruns")
    assert registered(project) == [1, 1]
    figure("disk full under MLflow", "making the store, logging: exit 1, 1 sentence; then 1 run, 1 model version")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", [".cache/journal", "data"])
def test_a_read_only_directory_is_one_sentence(
    small: Path, tmp_path: Path, figure: Figure, mounting: tuple[str, ...], place: str
) -> None:
    project = fresh(small, tmp_path / "project")
    (project / place).mkdir(exist_ok=True)
    done = in_namespace(
        mounting, project,
        f"mount --bind {place} {place} && mount -o remount,ro,bind {place} && {STAGE}.rollouts; echo status $?",
    )  # fmt: skip
    assert "status 1" in done.stdout, done.stderr
    (line,) = sentences(done.stderr, "rollouts")
    assert re.search(rf"{place}.* cannot be written \(Read-only file system\); mount it writable and run again", line)
    figure(f"read-only {place}", "exit 1, 1 sentence")


@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores mode bits; the bind mount above stands for them")
@pytest.mark.parametrize("place", [".cache/journal", "data"])
def test_a_directory_without_write_permission_is_one_sentence(
    small: Path, tmp_path: Path, figure: Figure, place: str
) -> None:
    project = fresh(small, tmp_path / "project")
    (project / place).mkdir(exist_ok=True)
    (project / place).chmod(0o555)
    done = run(project, "-m", "ragdistill.stages.rollouts")
    (project / place).chmod(0o755)
    assert done.returncode == 1, done.stderr
    (line,) = sentences(done.stderr, "rollouts")
    assert re.search(rf"{place}.* cannot be written \(Permission denied\); give yourself write permission", line)
    figure(f"{place} without permission", "exit 1, 1 sentence")
