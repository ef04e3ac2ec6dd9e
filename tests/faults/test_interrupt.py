"""Ctrl-C, as a terminal sends it: to the whole process group, at any moment, once or twice."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ragdistill.commands.smoke import override
from tests.faults.conftest import Figure
from tests.faults.project import (
    STUDENT,
    TRAINED,
    entries,
    fresh,
    group,
    journaled,
    learner,
    members,
    orphans,
    run,
    trained,
    weights,
)

ROLLOUTS = ("-m", "ragdistill.stages.rollouts")


def wait_for(where: Path, count: int, leader: subprocess.Popen[str]) -> None:
    """Until `count` episodes are in the journal."""
    while len(entries(where)) < count:
        assert leader.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.005)


def interrupt(leader: subprocess.Popen[str], presses: int = 1) -> tuple[int, str, str, list[int]]:
    """Ctrl-C; (exit status, stdout, stderr, processes left over)."""
    for _ in range(presses):
        if members(leader.pid):
            os.killpg(leader.pid, signal.SIGINT)
        time.sleep(0.02)
    out, err = leader.communicate(timeout=60)
    return leader.returncode, out, err, orphans(leader.pid)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("presses", [1, 3])
def test_a_playing_stage_says_what_it_keeps_and_leaves_nothing_behind(
    small: Path, tmp_path: Path, figure: Figure, presses: int
) -> None:
    project = fresh(small, tmp_path / "project")
    with group(project, *ROLLOUTS) as leader:
        wait_for(project, 5, leader)
        status, _, err, left = interrupt(leader, presses)
    kept = len(entries(project))
    lines = err.splitlines()
    assert status == 130, err
    assert not left
    said = lines[-1:] if presses > 1 else lines
    assert said == [f"rollouts: interrupted; {kept} finished episodes are kept, run again to go on."], err
    assert "Traceback" not in err
    assert len(journaled(project)) == kept
    figure(f"Ctrl-C x{presses}, playing stage", f"exit 130, 1 line, 0 tracebacks, 0 orphans; {kept} of 24 kept")


@pytest.mark.timeout(300)
def test_any_moment_of_a_stage_is_a_good_moment(small: Path, tmp_path: Path, figure: Figure) -> None:
    project, statuses = fresh(small, tmp_path / "project"), []
    for i in range(moments := int(os.environ.get("RAGDISTILL_INTERRUPTS", "5"))):
        with group(project, *ROLLOUTS) as leader:
            time.sleep(0.08 + 1.6 * i / moments)
            status, _, err, left = interrupt(leader)
        if "Fatal Python error: init" in err:
            continue  # a slow machine: Python itself had not started, no line of ours could answer
        assert "Traceback" not in err, err
        assert status in (130, -signal.SIGINT, 0), err
        assert not left
        statuses.append(status)
    assert set(statuses) - {0}, "none came in time"
    figure("Ctrl-C, imports to closing", f"{moments} moments, exits {sorted(set(statuses))}, 0 tracebacks, 0 orphans")


@pytest.mark.timeout(300)
def test_dvc_repro_stops_and_goes_on(small: Path, tmp_path: Path, figure: Figure) -> None:
    """DVC itself exits 255 after a failed stage; what the stage says stands above its line."""
    project = fresh(small, tmp_path / "project")
    with group(project, "-m", "dvc", "repro", "rollouts") as leader:
        wait_for(project, 5, leader)
        status, out, err, left = interrupt(leader)
    kept = len(entries(project))
    assert status != 0 and not left
    assert "Traceback" not in out + err
    assert f"rollouts: interrupted; {kept} finished episodes are kept, run again to go on." in err
    done = run(project, "-m", "dvc", "repro", "rollouts")
    assert done.returncode == 0, done.stderr
    assert f"{kept} of 24 episodes from the cache)" in done.stdout
    assert (project / "data/rollouts.jsonl").read_bytes().count(b"\n") == 24
    figure("Ctrl-C, dvc repro", f"exit {status}, 0 tracebacks, 0 orphans; {kept} of 24 kept and taken up again")


@pytest.mark.timeout(300)
def test_an_evaluation_says_what_it_keeps_and_goes_on(small: Path, tmp_path: Path, figure: Figure) -> None:
    project, evaluate = fresh(small, tmp_path / "project"), ("-m", "ragdistill.stages.evaluate", "base-0")
    override(project / "params.yaml", ["model.concurrency=1"])
    with group(project, *evaluate) as leader:
        wait_for(project, 1, leader)
        status, _, err, left = interrupt(leader)
    kept = len(entries(project))
    assert (status, left) == (130, [])
    assert err.splitlines() == [f"evaluate@base-0: interrupted; {kept} finished episodes are kept, run again to go on."]
    assert 0 < kept < 3 and not (project / "results/eval").exists()
    done = run(project, *evaluate)
    assert done.returncode == 0 and f"{kept} of 3 episodes from the cache)" in done.stdout, done.stderr
    figure("Ctrl-C, evaluation", f"exit 130, 1 line, 0 tracebacks, 0 orphans; {kept} of 3 kept and taken up again")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("stage", "name"), [(("sft", STUDENT), STUDENT), (("coldstart",), "base")], ids=["sft", "coldstart"]
)
def test_a_training_goes_on_from_its_checkpoint_to_the_same_weights(
    small: Path, learnt: dict[str, str], tmp_path: Path, figure: Figure, stage: tuple[str, ...], name: str
) -> None:
    project, module = learner(small, tmp_path / "project"), ("-m", f"ragdistill.stages.{stage[0]}", *stage[1:])
    with group(project, *module) as leader:
        while not list(project.glob(".cache/checkpoints/*/checkpoint-*/complete")):
            assert leader.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.005)
        status, _, err, left = interrupt(leader)
    done = [step for _, step, _ in trained(err)]
    said = [line for line in err.splitlines() if not TRAINED.match(line)]
    assert (status, left) == (130, []), err
    assert said == [f"{'@'.join(stage)}: interrupted; finished work is kept, run again to go on."], err
    again = run(project, *module)
    assert again.returncode == 0, again.stderr
    (_, first, steps), *_ = trained(again.stderr)
    assert 2 < first <= done[-1] + 1 and done[-1] < steps, "a checkpoint is taken up, and no step is left out"
    assert weights(project)[name] == learnt[name]
    figure(f"Ctrl-C, {stage[0]}", f"exit 130, 1 line; step {done[-1]} of {steps}, goes on at {first}; same weights")
