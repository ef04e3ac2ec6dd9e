"""Stage `teach@VARIANT`: the same agent plays the training tasks again.

hints: with k retrieved hints. retry: without, same budget (control). random: with other buckets' hints (control).
"""

from __future__ import annotations

from ragdistill.hints.retrieve import How
from ragdistill.params import Params
from ragdistill.records import Task, Trajectory, read_jsonl, write_jsonl
from ragdistill.stages.advising import retrieval
from ragdistill.stages.common import ROLLOUTS, TASKS, TEACH, item, run_stage
from ragdistill.stages.playing import open_model, play, summary, teacher_dir

HOW: dict[str, How] = {"hints": "retrieved", "random": "random"}


def chosen(tasks: list[Task], rollouts: list[Trajectory], which: str) -> list[Task]:
    """All tasks, or those that some base attempt failed."""
    failed = {t.task_id for t in rollouts if not t.success}
    return tasks if which == "all" else [t for t in tasks if t.id in failed]


def body(params: Params, variant: str) -> str:
    tasks = chosen(read_jsonl(TASKS / "train.jsonl", Task), read_jsonl(ROLLOUTS, Trajectory), params.teach.tasks)
    jobs = [(t, a) for t in tasks for a in range(params.teach.attempts)]
    model, policy = open_model(params, teacher_dir()), f"teach_{variant}"
    with retrieval(params, HOW.get(variant), model) as hints:
        done = play(params, policy, policy, jobs, model, params.teach.temperature, hints.retrieve, hints.key)
    write_jsonl(TEACH / f"{variant}.jsonl", done)
    return summary(done) + hints.words()


if __name__ == "__main__":
    variant = item()
    run_stage(f"teach@{variant}", lambda params: body(params, variant))
