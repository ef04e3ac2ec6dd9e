"""kill -9 of the whole DAG, every stage of it, and of trainings: same episodes, same weights, same numbers.

`RAGDISTILL_KILLS` (50) sets the number of kills of the whole DAG: first one aimed at each stage (in a training, at an
optimiser step), then as many as are left at random moments. Its player is scripted, so that it wins and there is
something to learn; that weights decide what is played is tested with the reference engine, on fewer stages.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from ragdistill.records import read_json, write_json
from tests.faults.conftest import Figure
from tests.faults.killing import REPRO, Aim, Ended, hits, repeated, until_done, watched
from tests.faults.outcome import assert_same, played, registered, tracked, wipe
from tests.faults.project import LEARNING, LORA, SMALL, STUDENT, group, lay_out, learner, run, weights

TRAININGS = "\n".join(f"{stage}.lora.{change}" for stage in ("coldstart", "sft") for change in LORA)
WHOLE = f"{SMALL}{LEARNING}tasks.test=6\ncoldstart.demos=4\ncoldstart.lora.epochs=2\nsft.seeds=[0,1]\n{TRAININGS}"
"""Two seeds: scripted play wins the same with hints as without, so the second student's adapter is the first's."""
REFERENCE = f"{WHOLE}\nmodel.engine=reference\nenv.max_steps=3\nagent.max_reply_tokens=12\nrollouts.attempts=1"
"""Replies of the toy model itself, which its weights decide to the bit."""
EVERY = 2
"""Optimiser steps between checkpoints, as `LEARNING` sets them."""
ROUNDS = 12
"""At most, until every stage was hit."""


def undisturbed(where: Path, overrides: str, *target: str) -> tuple[Path, Ended]:
    """A project after `dvc repro TARGET`, and how that went."""
    project = lay_out(where, overrides)
    config = project / "tiny/config.json"
    write_json(config, read_json(config) | {"max_position_embeddings": 4096})
    ended = watched(project, (*REPRO, *target))
    assert ended.status == 0, ended.text[-4000:]
    return project, ended


def aimed(stage: str, span: float, rng: random.Random, whole: Ended | None = None) -> Aim:
    """At a moment in `stage`; in a training, right after its third optimiser step or a later one.

    `whole`, an undisturbed run, tells which stages train; without it all that may.
    """
    name = "coldstart" if stage == "coldstart" else stage.removeprefix("sft@") if stage.startswith("sft@") else ""
    if name and (whole is None or name in whole.steps):
        return Aim(rng.uniform(0.0, 0.1), f"^{re.escape(name)}: step {rng.randint(3, 6)}/")
    return Aim(span * rng.uniform(0.1, 0.6), f"^Running stage '{re.escape(stage)}'")


def most_repeated(runs: list[Ended]) -> tuple[int, int, int]:
    """(trainings that were taken up again, steps done once more, the most by one kill)."""
    again = [n for counts in repeated(runs).values() for n in counts]
    assert all(0 <= n <= EVERY for n in again), f"steps were left out, or more than a checkpoint's repeated: {again}"
    return len(again), sum(again), max(again, default=0)


@pytest.mark.slow
@pytest.mark.timeout(10_800)
def test_fifty_kills_of_the_whole_dag_change_nothing(tmp_path: Path, figure: Figure) -> None:
    reference, whole = undisturbed(tmp_path / "reference", WHOLE)
    spans, seconds = whole.spans(), whole.lines[-1][0]
    shutil.copytree(reference, project := tmp_path / "project", symlinks=True)
    rng, hit, again, rounds, count = random.Random(2), Counter[str](), Counter[str](), 0, 0
    wanted = int(os.environ.get("RAGDISTILL_KILLS", "50"))
    while (missed := [s for s in spans if s not in hit]) or hit.total() < wanted:
        assert rounds < ROUNDS, f"never hit: {missed}"
        aims = [aimed(stage, spans[stage], rng, whole) for stage in missed]
        rest = 0 if missed else min(12, wanted - hit.total())
        aims += [Aim(seconds * rng.uniform(0.01, 0.4)) for _ in range(rest)]
        wipe(project)
        runs = until_done(project, REPRO, aims)
        hit, rounds, count = hit + hits(runs), rounds + 1, assert_same(project, reference)
        resumed, steps, most = most_repeated(runs)
        again += Counter(resumed=resumed, steps=steps)
        again["most"] = max(again["most"], most)
        assert registered(project) == [1, 1], "a run or a model version was registered twice"
    assert again["resumed"] >= 3, "no training was taken up again"
    figure(
        "kill -9, whole DAG (slow)",
        f"{hit.total()} kills in {rounds} runs: 0 of {count} episodes lost, 0 played twice, same weights of base and "
        "students, same metrics, 1 model version",
    )
    figure("kills by stage", ", ".join(f"{stage} {hit[stage]}" for stage in ("dvc", *spans)))
    figure(
        "trainings killed",
        f"{again['resumed']} taken up again, {again['steps']} steps done twice, at most {again['most']} a kill",
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_change_nothing_that_weights_decide(tmp_path: Path, figure: Figure) -> None:
    """Cold start, rollouts, a student and its evaluation, played by the toy model that was trained."""
    reference, whole = undisturbed(tmp_path / "reference", REFERENCE, "rollouts")
    shutil.copytree(reference, project := tmp_path / "project", symlinks=True)
    wipe(project)
    rng, span = random.Random(3), whole.spans()["rollouts"]
    aims = [aimed("coldstart", 0.0, rng), *(Aim(span * share, "^Running stage 'rollouts'") for share in (0.5, 0.8))]
    runs = until_done(project, (*REPRO, "rollouts"), aims)
    module, commands = "ragdistill.stages", (("sft", STUDENT), ("evaluate", STUDENT))
    for stage, item in commands:
        for where in (reference, project):
            (where / "data/sft").mkdir(exist_ok=True)
            shutil.copy(where / "data/demos.jsonl", where / "data/sft/distilled.jsonl")
        command = ("-m", f"{module}.{stage}", item)
        started = time.monotonic()
        assert watched(reference, command).status == 0
        took = time.monotonic() - started
        student = [aimed(f"sft@{item}", 0.0, rng), aimed(f"sft@{item}", 0.0, rng)]
        runs += until_done(project, command, student if stage == "sft" else [Aim(took * 0.5), Aim(took * 0.8)])
    count = assert_same(project, reference, reported=False)
    episodes = played(project)
    assert {t.policy for t in episodes} == {"base", "distilled"} and all(t.steps for t in episodes)
    replies = [{s.reply for t in episodes if t.policy == p for s in t.steps} for p in ("base", "distilled")]
    assert replies[0] != replies[1], "the weights decide nothing, so nothing was tested"
    kills, (resumed, steps, _) = sum(run.killed for run in runs), most_repeated(runs)
    assert kills >= 5 and resumed >= 2
    figure(
        "kill -9, reference engine (slow)",
        f"{kills} kills: 0 of {count} episodes differ in a byte, same weights; {steps} optimiser steps done twice",
    )


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_training_killed_again_and_again_repeats_no_more_than_since_the_last_checkpoint(
    small: Path, learnt: dict[str, str], tmp_path: Path, figure: Figure
) -> None:
    project = learner(small, tmp_path / "project")
    aims = [Aim(0.0, f"^{STUDENT}: step {step}/") for step in (1, 2, 5, 8, 8)]
    runs = until_done(project, ("-m", "ragdistill.stages.sft", STUDENT), aims)
    kills = sum(run.killed for run in runs)
    resumed, steps, most = most_repeated(runs)
    assert kills >= 4 and resumed >= 2, [run.steps for run in runs]
    assert weights(project)[STUDENT] == learnt[STUDENT]
    figure("kill -9 in training", f"{kills} kills: {steps} steps done twice, at most {most} a kill; same weights")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_while_mlflow_makes_its_store_leaves_none_or_a_whole_one(
    small: Path, tmp_path: Path, figure: Figure
) -> None:
    """Half a store could never be opened again: MLflow's tables are made in dozens of steps."""
    project = tracked(small, tmp_path / "project")
    (scratch := tmp_path / "scratch").mkdir()
    moments = [0.02 + 0.15 * i for i in range(6)]
    for moment in moments:
        with group(project, "-m", "ragdistill.stages.track", TMPDIR=str(scratch)) as leader:
            while not list(scratch.glob("mlflow-*/mlflow.db")):
                assert leader.poll() is None, leader.communicate()
                time.sleep(0.005)
            time.sleep(moment)
            os.killpg(leader.pid, signal.SIGKILL)
        shutil.rmtree(scratch)
        scratch.mkdir()
        done = run(project, "-m", "ragdistill.stages.track", TMPDIR=str(scratch))
        assert done.returncode == 0, done.stderr
        assert registered(project) == [1, 1]
        shutil.rmtree(project / "mlruns")
    figure("kill -9, MLflow's store in the making", f"{len(moments)} moments: the next run has 1 run, 1 model version")
