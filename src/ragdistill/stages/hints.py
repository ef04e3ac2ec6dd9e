"""Stage `hints`: mines the rollouts into a hint bank (`bank.jsonl`) with an audit of every merge and refusal."""

from __future__ import annotations

from ragdistill.contamination import check_unseen
from ragdistill.hints.bank import build_bank
from ragdistill.hints.mine import mine
from ragdistill.params import Params
from ragdistill.records import Task, Trajectory, read_jsonl, write_jsonl
from ragdistill.stages.common import BANK, ROLLOUTS, TASKS, run_stage


def body(params: Params) -> str:
    trajectories = read_jsonl(ROLLOUTS, Trajectory)
    check_unseen((t.task_id for t in trajectories), read_jsonl(TASKS / "eval.jsonl", Task), "the rollouts")
    bank, audit = build_bank(mine(trajectories, params.hints), params.hints)
    write_jsonl(BANK, [h for hints in bank.values() for h in hints])
    write_jsonl(BANK.with_name("audit.jsonl"), audit)
    return f"{sum(map(len, bank.values()))} hints in {len(bank)} buckets, {len(audit)} merged or refused"


if __name__ == "__main__":
    run_stage("hints", body)
