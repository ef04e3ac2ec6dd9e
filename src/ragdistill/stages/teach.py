"""Stage `teach@VARIANT`: the same agent plays the training tasks again.

hints: with k retrieved hints. retry: without, same budget (control). random: with other buckets' hints (control).
"""

from __future__ import annotations

from ragdistill.hints.bank import load_bank
from ragdistill.hints.retrieve import How, bank_key, retriever
from ragdistill.params import Params
from ragdistill.records import Task, Trajectory, read_jsonl, write_jsonl
from ragdistill.stages.common import BANK, ROLLOUTS, TASKS, TEACH, item, run_stage
from ragdistill.stages.playing import open_model, play, summary, teacher_dir

HOW: dict[str, How] = {"hints": "retrieved", "random": "random"}


def chosen(tasks: list[Task], rollouts: list[Trajectory], which: str) -> list[Task]:
    """All tasks, or those that some base attempt failed."""
    failed = {t.task_id for t in rollouts if not t.success}
    return tasks if which == "all" else [t for t in tasks if t.id in failed]


def body(params: Params, variant: str) -> str:
    tasks = chosen(read_jsonl(TASKS / "train.jsonl", Task), read_jsonl(ROLLOUTS, Trajectory), params.teach.tasks)
    jobs = [(t, a) for t in tasks for a in range(params.teach.attempts)]
    how = HOW.get(variant)
    bank = load_bank(BANK, params.hints)
    done = play(
        params, f"teach_{variant}", f"teach_{variant}", jobs, open_model(params, teacher_dir()),
        params.teach.temperature,
        retrieve=retriever(bank, params.hints.k, how) if how else None,
        hints_key=bank_key(bank, params.hints.k, how) if how else "",
    )  # fmt: skip
    write_jsonl(TEACH / f"{variant}.jsonl", done)
    return summary(done)


if __name__ == "__main__":
    variant = item()
    run_stage(f"teach@{variant}", lambda params: body(params, variant))
