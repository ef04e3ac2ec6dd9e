"""Stage `rollouts`: the teacher's model plays the training tasks without hints, several sampled attempts each."""

from __future__ import annotations

from ragdistill.params import Params
from ragdistill.records import Task, read_jsonl, write_jsonl
from ragdistill.stages.common import ROLLOUTS, TASKS, run_stage
from ragdistill.stages.defaults import attempts
from ragdistill.stages.playing import open_model, play, summary, teacher_dir


def body(params: Params) -> str:
    tasks = read_jsonl(TASKS / "train.jsonl", Task)
    jobs = [(t, a) for t in tasks for a in range(attempts(params))]
    model = open_model(params, teacher_dir())
    done = play(params, "base", "rollouts", jobs, model, params.rollouts.temperature)
    write_jsonl(ROLLOUTS, done)
    return summary(done)


if __name__ == "__main__":
    run_stage("rollouts", body)
