"""Stage `lift`: what each hint does alone, on training tasks, against no hint; nothing unless `lift.hints` says so."""

from __future__ import annotations

from ragdistill.contamination import check_unseen
from ragdistill.hints.bank import hints_of, load_bank
from ragdistill.hints.lift import LiftRow, measure, plan
from ragdistill.params import Params
from ragdistill.records import Hint, Task, Trajectory, digest, read_jsonl, write_jsonl
from ragdistill.rollout import Retrieve
from ragdistill.stages.common import BANK, LIFT, ROLLOUTS, TASKS, run_stage
from ragdistill.stages.playing import open_model, play_each, setting_of, summary, teacher_dir


def alone(hint: Hint) -> Retrieve:
    """Shows `hint`, and nothing else, in its bucket."""
    return lambda bucket, goal, seed: [hint] if bucket == hint.bucket else []


def body(params: Params) -> str:
    if not params.lift.hints:
        write_jsonl(LIFT / "measured.jsonl", [])
        write_jsonl(LIFT / "trajectories.jsonl", [])
        return "not measured (lift.hints is 0)"
    tasks, bank = read_jsonl(TASKS / "train.jsonl", Task), load_bank(BANK, params.hints)
    check_unseen((t.id for t in tasks), read_jsonl(TASKS / "eval.jsonl", Task), "the training tasks")
    buckets = {t.task_id: t.bucket for t in read_jsonl(ROLLOUTS, Trajectory)}
    planned = plan(bank, tasks, buckets, params.lift)
    hints = [h for h in hints_of(bank) if planned.get(h.id)]
    plain = {t.id: t for h in hints for t in planned[h.id]}
    attempts = range(params.lift.attempts)
    model = open_model(params, teacher_dir())

    def setting(policy: str, hint: Hint | None = None):  # noqa: ANN202 - setting_of's
        shown, key = (alone(hint), digest("lift", hint.id, hint.text)) if hint else (None, "")
        return setting_of(params, policy, "lift", model, params.teach.temperature, shown, key)

    work = [(setting("unhinted"), [(t, a) for t in plain.values() for a in attempts])]
    work += [(setting(f"hint_{h.id[:8]}", h), [(t, a) for t in planned[h.id] for a in attempts]) for h in hints]
    without, *shown = play_each(params, work, model)
    rows = measure(hints, {h.id: t for h, t in zip(hints, shown, strict=True)}, without, params.report)
    write_jsonl(LIFT / "measured.jsonl", rows)
    played = [t for part in (without, *shown) for t in part]
    write_jsonl(LIFT / "trajectories.jsonl", played)
    return f"{len(rows)} hints on {len(plain)} tasks, {_clear(rows)}; {summary(played)}"


def _clear(rows: list[LiftRow]) -> str:
    helpful, harmful = sum(r.lo > 0 for r in rows), sum(r.hi < 0 for r in rows)
    return f"{helpful} clearly helpful and {harmful} clearly harmful alone"


if __name__ == "__main__":
    run_stage("lift", body)
