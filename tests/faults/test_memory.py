"""Memory that is short in a stage: one sentence that names what takes less, exit 1, and the next run goes on.

The allocation that fails is real: more than the address space holds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ragdistill.commands.smoke import override
from tests.faults.conftest import Figure
from tests.faults.project import STUDENT, TRAINED, fresh, learner, run, trained, weights

TRAINING = """
import runpy, sys
from ragdistill.stages.common import quiet_libraries
quiet_libraries()
import torch
from ragdistill.training import trainer
step = trainer.TokenLossTrainer.training_step
def greedy(self, *args, **kwargs):
    if self.state.global_step == 4:
        torch.empty(10**15)
    return step(self, *args, **kwargs)
trainer.TokenLossTrainer.training_step = greedy
stage = sys.argv.pop(1)
runpy.run_module("ragdistill.stages." + stage, run_name="__main__")
"""
LOADING = """
import runpy
from ragdistill.stages.common import quiet_libraries
quiet_libraries()
import numpy
from ragdistill.llm import local
local.load_merged = lambda *args: numpy.empty(10**18)
runpy.run_module("ragdistill.stages.rollouts", run_name="__main__")
"""
PLAYING = """
import runpy
from ragdistill.stages.common import quiet_libraries
quiet_libraries()
import torch
from ragdistill.llm.local import LocalEngine
LocalEngine._forward = lambda *args: torch.empty(10**15)
runpy.run_module("ragdistill.stages.rollouts", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("stage", "name"), [(("sft", STUDENT), STUDENT), (("coldstart",), "base")], ids=["sft", "cold"]
)
def test_a_training_out_of_memory_names_its_batch_and_goes_on_from_its_checkpoint(
    small: Path, learnt: dict[str, str], tmp_path: Path, figure: Figure, stage: tuple[str, ...], name: str
) -> None:
    project = learner(small, tmp_path / "project")
    done = run(project, "-c", TRAINING, *stage)
    said = [line for line in done.stderr.splitlines() if not TRAINED.match(line)]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert said[0].startswith(f"{'@'.join(stage)}: the memory is not enough (can't allocate memory: you tried to")
    assert f"; set training.checkpointing to true or lower {stage[0]}.lora.batch and run again, finished" in said[0]
    again = run(project, "-m", f"ragdistill.stages.{stage[0]}", *stage[1:])
    assert again.returncode == 0, again.stderr
    assert [step for _, step, _ in trained(done.stderr + again.stderr)] == list(range(1, 9)), "nothing twice"
    assert weights(project)[name] == learnt[name]
    figure(f"{stage[0]} out of memory", "exit 1, 1 sentence; 0 steps done twice, same weights")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("code", "says"),
    [
        (LOADING, "rollouts: the memory is not enough (Unable to allocate "),
        (PLAYING, "rollouts: 24 of 24 episodes ended in infrastructure faults (The local engine had not enough memory"),
    ],
    ids=["loading", "playing"],
)
def test_a_playing_stage_out_of_memory_names_its_concurrency(
    small: Path, tmp_path: Path, figure: Figure, code: str, says: str
) -> None:
    project = fresh(small, tmp_path / "project")
    override(project / "params.yaml", ["model.engine=batched"])
    done = run(project, "-c", code)
    said = done.stderr.splitlines()
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert said[0].startswith(says) and "; lower model.concurrency" in said[0]
    assert not (project / "data/rollouts.jsonl").exists()
    figure(f"rollouts out of memory, {'loading' if code is LOADING else 'playing'}", "exit 1, 1 sentence, 0 scored")
