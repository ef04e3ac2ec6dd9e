"""kill -9 of everything at random moments, and two runs at once: no episode lost, none played twice, same results.

`RAGDISTILL_KILLS` sets the number of kills. Here `dvc repro strip` of the small project is killed a few times;
test_kill_dag kills the whole scripted DAG and trainings.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from zc.lockfile import LockFile

from ragdistill.doctor import check_dvc
from ragdistill.records import Trajectory, read_jsonl
from tests.faults.conftest import Figure
from tests.faults.killing import REPRO, UNLOCK, Aim, hits, until_done
from tests.faults.outcome import assert_same
from tests.faults.project import LAST, fresh, group, journaled, run

BUSY = re.compile(r"Unable to acquire lock|is busy, it is being blocked by:")
"""DVC's words for a lock, of the repository and of a file, that another process holds."""


def test_a_file_that_a_kill_cut_off_is_removed_and_a_whole_one_stays(small: Path, tmp_path: Path) -> None:
    """DVC writes its files in place; every command of DVC refuses half of one."""
    project = fresh(small, tmp_path / "project")
    (project / ".dvc/tmp").mkdir(parents=True, exist_ok=True)
    whole = {".dvc/tmp/rwlock": '{"read": {}, "write": {}}', "dvc.lock": (project / "dvc.lock").read_text()}
    for name, text in whole.items():
        for written, stays in (("", False), (text[:17], False), (text, True)):
            (project / name).write_text(written)
            assert (check_dvc(project).status == "ok") == stays
            subprocess.run([sys.executable, UNLOCK], cwd=project, check=True)
            assert (project / name).exists() == stays
            assert check_dvc(project).status == "ok"


def test_half_a_file_that_dvc_is_writing_is_left_to_it(small: Path, tmp_path: Path) -> None:
    project = fresh(small, tmp_path / "project")
    (project / ".dvc/tmp").mkdir(parents=True, exist_ok=True)
    (project / "dvc.lock").write_text("")
    busy = LockFile(project / ".dvc/tmp/lock")
    subprocess.run([sys.executable, UNLOCK], cwd=project, check=True)
    assert (project / "dvc.lock").exists()
    busy.close()
    subprocess.run([sys.executable, UNLOCK], cwd=project, check=True)
    assert not (project / "dvc.lock").exists()


@pytest.mark.timeout(600)
def test_a_record_of_stages_cut_off_by_a_kill_costs_no_stage(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, project := tmp_path / "project", symlinks=True)
    before = (project / "dvc.lock").read_text()
    (project / "dvc.lock").write_text("")
    assert "validation failed" in run(project, *REPRO, LAST).stderr
    subprocess.run([sys.executable, UNLOCK], cwd=project, check=True)
    entries = journaled(project)
    done = run(project, *REPRO, LAST)
    assert done.returncode == 0, done.stderr[-2000:]
    assert journaled(project) == entries
    assert (project / "dvc.lock").read_text() == before


@pytest.mark.timeout(600)
def test_kill_9_at_random_moments_changes_nothing(small: Path, tmp_path: Path, figure: Figure) -> None:
    project, rng = fresh(small, tmp_path / "project"), random.Random(1)
    aims = [Aim(rng.uniform(1.0, 4.0)) for _ in range(int(os.environ.get("RAGDISTILL_KILLS", "3")))]
    runs = until_done(project, (*REPRO, LAST), aims)
    count, hit = assert_same(project, small, reported=False), hits(runs)
    assert hit
    figure(
        "kill -9, dvc repro strip",
        f"{hit.total()} kills: 0 of {count} episodes lost, 0 played twice, same data, 0 orphans",
    )


@pytest.mark.timeout(300)
def test_two_repros_at_once_do_not_disturb_each_other(small: Path, tmp_path: Path, figure: Figure) -> None:
    """DVC locks a stage's outputs: the second run refuses in a sentence, or finds all done."""
    project = fresh(small, tmp_path / "project")
    command = (*REPRO, LAST)
    with group(project, *command) as one, group(project, *command) as two:
        said = [x.communicate(timeout=200) for x in (one, two)]
        ended = [one.returncode, two.returncode]
    assert "Traceback" not in str(said), said
    for status, (out, err) in zip(ended, said, strict=True):
        assert status == 0 or BUSY.search(out + err), (status, out, err)
    if 0 not in ended:
        again = run(project, *command)
        assert again.returncode == 0, again.stderr
    count = assert_same(project, small, reported=False)
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
