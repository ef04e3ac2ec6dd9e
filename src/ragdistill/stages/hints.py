"""Stage `hints`: turns the rollouts into a hint bank (`bank.jsonl`) with an audit of every merge and refusal.

Extractor offline mines them, without any model. Extractor llm lets a model read failures; what it wrote and was not
let in stands in `quarantine.jsonl`, the account of it in `extraction.json`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ragdistill import progress
from ragdistill.contamination import check_unseen
from ragdistill.errors import EmptyResultError
from ragdistill.hints.bank import build_bank
from ragdistill.hints.mine import mine
from ragdistill.params import Params
from ragdistill.records import Hint, Task, Trajectory, read_jsonl, write_json, write_jsonl
from ragdistill.stages.common import BANK, ROLLOUTS, TASKS, run_stage

QUARANTINE = BANK.with_name("quarantine.jsonl")


def body(params: Params) -> str:
    trajectories = read_jsonl(ROLLOUTS, Trajectory)
    check_unseen((t.task_id for t in trajectories), read_jsonl(TASKS / "eval.jsonl", Task), "the rollouts")
    if params.hints.extractor == "llm":
        found, how = ask(params, trajectories)
    else:
        found, how = mine(trajectories, params.hints), ""
    bank, audit = build_bank(found, params.hints)
    write_jsonl(BANK, [h for hints in bank.values() for h in hints])
    write_jsonl(BANK.with_name("audit.jsonl"), audit)
    return f"{sum(map(len, bank.values()))} hints in {len(bank)} buckets, {len(audit)} merged or refused{how}"


def ask(params: Params, trajectories: Sequence[Trajectory]) -> tuple[list[Hint], str]:
    """Hints by a model, and what that took in one phrase."""
    from ragdistill.hints.extract import extract
    from ragdistill.stages.advising import asker, open_hint_model
    from ragdistill.stages.spending import tell

    model = open_hint_model(params, params.hints.llm.model)
    paid = asker(params, model)
    try:
        with progress.bar("calls") as bar:
            paid.on_reply = lambda: bar.at(paid.calls, paid.replayed)
            done = asyncio.run(extract(trajectories, paid, params.hints, params.seed))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{paid.calls} finished calls are kept") from None
    finally:
        model.close()
        tell(model)
    write_jsonl(QUARANTINE, done.quarantined)
    write_json(BANK.with_name("extraction.json"), done.account)
    if not done.hints:
        raise EmptyResultError(
            f"None of {done.account.proposed} hints of {done.account.cases} cases was let in, see {QUARANTINE}; "
            "name a more capable hints.llm.model."
        )
    return done.hints, (
        f"; {done.account.cases} cases ({done.account.paired} paired), {paid.calls} calls "
        f"({paid.replayed} from the journal), {paid.usage.billed} tokens, {len(done.quarantined)} quarantined"
    )


if __name__ == "__main__":
    run_stage("hints", body)
