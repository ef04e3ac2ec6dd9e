"""Stage `evaluate@POLICY-SEED`: one policy on the held-out tasks, greedy, one attempt each.

Policies: raw, base, rag (k retrieved hints), rag_random, rag_constant (controls), and every trained student.
"""

from __future__ import annotations

from typing import get_args

from ragdistill.contamination import OWN, check_disjoint
from ragdistill.envs import defaults_of, make_domain
from ragdistill.errors import DataError
from ragdistill.hints.retrieve import How
from ragdistill.llm import engine_of
from ragdistill.params import Params, Untrained
from ragdistill.records import EvalEpisode, Task, read_jsonl, write_json, write_jsonl
from ragdistill.stages.advising import retrieval
from ragdistill.stages.common import BASE, ENGINE, EVAL, RAW, STUDENTS, TASKS, item, run_stage
from ragdistill.stages.playing import open_model, play_each, setting_of, summary

HOW: dict[str, How] = {"rag": "retrieved", "rag_random": "random", "rag_constant": "constant"}


def body(params: Params, policy: str, seed: int) -> str:
    tasks = read_jsonl(TASKS / "eval.jsonl", Task)
    group = defaults_of(make_domain(params.env)).group if params.tasks.eval_split in OWN else None
    check_disjoint(read_jsonl(TASKS / "train.jsonl", Task), tasks, group)
    student = STUDENTS / f"{policy}-{seed}"
    trained = policy not in get_args(Untrained)
    if trained and not student.exists():
        raise DataError(f"{student} does not exist; run the stage sft@{policy}-{seed}, or correct the name.")
    model = open_model(params, RAW if policy == "raw" else BASE, student if trained else None)
    jobs, temperature = [(t, 0) for t in tasks], params.evaluate.temperature
    with retrieval(params, HOW.get(policy), model) as hints:
        how = (hints.retrieve, hints.key)
        setting = setting_of(params, policy, "evaluate", model, temperature, *how, student=trained)
        (done,) = play_each(params, [(setting, jobs)], model)
    out = EVAL / f"{policy}-{seed}"
    write_json(out / ENGINE, engine_of(model))
    write_jsonl(out / "trajectories.jsonl", done)
    write_jsonl(out / "episodes.jsonl", [EvalEpisode.of(t, policy, seed) for t in done])
    return summary(done) + hints.words()


if __name__ == "__main__":
    name = item()
    policy, _, seed = name.rpartition("-")
    run_stage(f"evaluate@{name}", lambda params: body(params, policy, int(seed)))
