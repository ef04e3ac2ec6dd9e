"""kill -9 of everything at random moments, and two runs at once: no episode lost, none played twice, same results.

`RAGDISTILL_KILLS` sets the number of kills. The fast tier kills `dvc repro strip` of the small project a few times, the
slow one kills the whole scripted DAG, training, evaluation and MLflow included, at least fifty times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ragdistill.doctor import check_dvc
from ragdistill.records import Trajectory, read_jsonl
from tests.faults.conftest import Figure
from tests.faults.project import LAST, SMALL, entries, fresh, group, journaled, make_project, orphans, run

UNLOCK = Path("scripts/unlock.py").resolve()
TRAINING = ("r=4", "epochs=1", "batch=4", "max_tokens=32000")
WHOLE = "\n".join([
    SMALL, "tasks.test=6", "coldstart.enabled=true", "coldstart.demos=4",
    *(f"{stage}.lora.{change}" for stage in ("coldstart", "sft") for change in TRAINING),
])  # fmt: skip


def played(project: Path) -> list[Trajectory]:
    """Every trajectory file of the project, times aside."""
    files = [project / "data/rollouts.jsonl", *sorted(project.glob("data/teach/*.jsonl"))]
    files += sorted(project.glob("results/eval/*/trajectories.jsonl"))
    return [msgspec.structs.replace(t, seconds=0.0) for f in files for t in read_jsonl(f, Trajectory)]


def metrics(project: Path) -> Any:
    """`results/metrics.json` without what the clock decides; None when it is not made."""
    path = project / "results/metrics.json"
    return timeless(json.loads(path.read_text())) if path.exists() else None


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "second" not in k and "latency" not in k}
    return [timeless(v) for v in value] if isinstance(value, list) else value


class Watch:
    """Sees every journal entry when it appears, and that it is never touched again."""

    def __init__(self, project: Path) -> None:
        self.project, self.seen = project, {}

    def look(self) -> None:
        now = {p: p.stat().st_mtime_ns for p in entries(self.project)}
        assert all(now.get(p) == at for p, at in self.seen.items()), "an episode was lost or played twice"
        self.seen = now


def kill_until_done(project: Path, target: tuple[str, ...], moments: Iterator[float]) -> int:
    """`make run`'s two steps with TARGET again and again, killed after each of `moments` (seconds); how many hit."""
    watch, kills = Watch(project), 0
    while True:
        subprocess.run([sys.executable, UNLOCK], cwd=project, check=True)
        with group(project, "-m", "dvc", "repro", *target) as leader:
            try:
                out, err = leader.communicate(timeout=next(moments, None))
            except subprocess.TimeoutExpired:
                os.killpg(leader.pid, signal.SIGKILL)
                out, err = leader.communicate()
                kills += 1
        assert not orphans(leader.pid)
        watch.look()
        if leader.returncode == 0:
            return kills
        assert leader.returncode == -signal.SIGKILL, out[-2000:] + err[-2000:]


def assert_same(project: Path, reference: Path) -> int:
    """Same episodes, each once, same metrics; returns their number."""
    found, expected = played(project), played(reference)
    assert [t.id for t in found] == [t.id for t in expected]
    assert found == expected
    assert set(journaled(project)) == set(journaled(reference))
    assert metrics(project) == metrics(reference)
    return len(found)


def test_a_lock_file_cut_off_by_a_kill_is_removed_and_a_whole_one_stays(small: Path, tmp_path: Path) -> None:
    """DVC writes it in place; every command of DVC refuses half a file."""
    project = fresh(small, tmp_path / "project")
    lock = project / ".dvc/tmp/rwlock"
    for text, stays in (("", False), ('{"read": {"a', False), ('{"read": {}, "write": {}}', True)):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.write_text(text)
        assert (check_dvc(project).status == "ok") == stays
        subprocess.run([sys.executable, UNLOCK], cwd=project, check=True)
        assert lock.exists() == stays
        assert check_dvc(project).status == "ok"


@pytest.mark.timeout(600)
def test_kill_9_at_random_moments_changes_nothing(small: Path, tmp_path: Path, figure: Figure) -> None:
    project, rng = fresh(small, tmp_path / "project"), random.Random(1)
    wanted = int(os.environ.get("RAGDISTILL_KILLS", "3"))
    kills = kill_until_done(project, (LAST,), iter([rng.uniform(1.0, 4.0) for _ in range(wanted)]))
    count = assert_same(project, small)
    assert kills
    figure(
        "kill -9, dvc repro strip", f"{kills} kills: 0 of {count} episodes lost, 0 played twice, same data, 0 orphans"
    )


def wipe(project: Path) -> None:
    """Everything a run makes is gone; translated games stay, they only save time."""
    made = ("dvc.lock", "data", "models", "results", "mlruns", ".dvc/cache", ".dvc/tmp")
    for name in (*made, *(f".cache/{n}" for n in ("journal", "adapters", "checkpoints", "timing"))):
        path = project / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(10_800)
def test_fifty_kills_of_the_whole_dag_change_nothing(tmp_path: Path, figure: Figure) -> None:
    started = time.monotonic()
    reference = make_project(tmp_path / "reference", WHOLE, ())
    whole = time.monotonic() - started
    shutil.copytree(reference, project := tmp_path / "project", symlinks=True)
    rng, kills, rounds, count = random.Random(2), 0, 0, 0
    wanted = int(os.environ.get("RAGDISTILL_KILLS", "50"))
    while kills < wanted:
        wipe(project)
        kills += kill_until_done(
            project, (), iter([whole * rng.uniform(0.01, 0.4) for _ in range(min(12, wanted - kills))])
        )
        count, rounds = assert_same(project, reference), rounds + 1
        with closing(sqlite3.connect(project / "mlruns/mlflow.db")) as store:
            rows = [
                store.execute(f"select count(*) from {table}").fetchone()[0] for table in ("runs", "model_versions")
            ]
        assert rows == [1, 1], "a run or a model version was registered twice"
    figure(
        "kill -9, whole DAG (slow)",
        f"{kills} kills in {rounds} runs: 0 of {count} episodes lost, 0 played twice, same metrics, 1 model version",
    )


@pytest.mark.timeout(300)
def test_two_repros_at_once_do_not_disturb_each_other(small: Path, tmp_path: Path, figure: Figure) -> None:
    """DVC locks a stage's outputs: the second run refuses in a sentence, or finds all done."""
    project = fresh(small, tmp_path / "project")
    command = ("-m", "dvc", "repro", LAST)
    with group(project, *command) as one, group(project, *command) as two:
        said = [x.communicate(timeout=200) for x in (one, two)]
        ended = [one.returncode, two.returncode]
    assert "Traceback" not in str(said), said
    assert all(status == 0 or "lock" in out + err for status, (out, err) in zip(ended, said, strict=True)), said
    if 0 not in ended:
        again = run(project, *command)
        assert again.returncode == 0, again.stderr
    count = assert_same(project, small)
    figure("two dvc repro at once", f"exits {ended}; then 0 of {count} episodes lost or doubled, same data")


@pytest.mark.timeout(300)
def test_two_runs_of_a_stage_share_one_journal(small: Path, tmp_path: Path, figure: Figure) -> None:
    project = fresh(small, tmp_path / "project")
    command = ("-m", "ragdistill.stages.rollouts")
    with group(project, *command) as one, group(project, *command) as two:
        said = [x.communicate(timeout=200)[1] for x in (one, two)]
        assert (one.returncode, two.returncode) == (0, 0), said
    rows = read_jsonl(project / "data/rollouts.jsonl", Trajectory)
    assert len({(t.task_id, t.attempt) for t in rows}) == len(rows) == len(journaled(project)) == 24
    figure("one stage twice at once", f"both exit 0; {len(rows)} entries for {len(rows)} episodes, 0 damaged")
