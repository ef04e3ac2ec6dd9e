"""What a stage's calls to a served model cost: told at the stage's end, kept in a JSON file.

The files lie where the stages' timings lie; `collect` joins them for the report. Knows no HTTP.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from ragdistill.llm import ChatModel
from ragdistill.llm.ledger import UNTOLD, Account
from ragdistill.records import read_json, write_json

SPENDING = Path(".cache/spending")
"""Accounts of this workspace, one file a stage, beside its timings."""
SERVED = "endpoint"
"""Value of `model.engine` and `model.teacher`; name of the pointer that stage `base` leaves for a served teacher."""


def stage_name() -> str:
    """The stage this process runs, as `common.run_stage` calls it, out of the command line; also a command's name."""
    return "@".join([Path(sys.argv[0]).stem, *sys.argv[1:2]])


def is_served(model: ChatModel) -> bool:
    """Whether `model` keeps an account of its calls."""
    return isinstance(getattr(model, "account", None), Account)


def tell(model: ChatModel) -> None:
    """Print and keep what a served model's calls cost; of other models there is nothing to tell."""
    account = getattr(model, "account", None)
    if not isinstance(account, Account):
        return
    kept = msgspec.to_builtins(account) | {"tokens_counted": getattr(model, "counting", "")}
    write_json(SPENDING / f"{account.stage}.json", kept)
    print(line(account), flush=True)


def line(a: Account) -> str:
    """Calls, tokens and money in one sentence."""
    unsure = f", {a.unsure_money:.4f} of it {UNTOLD}" if a.unsure_money else ""
    return (
        f"{a.model}: {a.paid_calls} calls paid, {a.replayed_calls} from the journal, {a.failed_attempts} attempts "
        f"failed; {a.prompt_tokens:,} prompt tokens ({a.cached_tokens:,} cached), {a.completion_tokens:,} completion; "
        f"{a.money:.4f} {a.currency}{unsure}; at most {a.most_at_once} calls at once"
    )


def collect() -> dict[str, Any]:
    """Stage → account of its last run in this workspace."""
    return {kept["stage"]: kept for kept in map(read_json, sorted(SPENDING.glob("*.json")))}
