"""What calls to a served model cost: a process's own told at its end, the project's read from the ledger.

The ledger alone knows what was paid: it outlives kills, repeated runs and several models in one stage. Knows no HTTP.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ragdistill.checks import calls_endpoint
from ragdistill.journal import cache_dir
from ragdistill.llm import ChatModel
from ragdistill.llm.ledger import UNTOLD, Account, Spent, spending
from ragdistill.params import Params

SERVED = "endpoint"
"""Value of `model.engine` and `model.teacher`; name of the pointer that stage `base` leaves for a served teacher."""


def ledger_file() -> Path:
    """The accounts that all stages and experiments of this project share."""
    return cache_dir("ledger.jsonl")


def stage_name() -> str:
    """The stage this process runs, as `common.run_stage` calls it, out of the command line; also a command's name."""
    return "@".join([Path(sys.argv[0]).stem, *sys.argv[1:2]])


def is_served(model: ChatModel) -> bool:
    """Whether `model` keeps an account of its calls."""
    return isinstance(getattr(model, "account", None), Account)


def tell(model: ChatModel) -> None:
    """Print what a served model's calls cost in this process; of other models there is nothing to tell."""
    account = getattr(model, "account", None)
    if isinstance(account, Account):
        print(f"{line(account)}; prompts {getattr(model, 'counting', 'not counted')}", flush=True)


def line(a: Account) -> str:
    """Calls, tokens and money in one sentence."""
    unsure = f", {a.unsure_money:.4f} of it {UNTOLD}" if a.unsure_money else ""
    return (
        f"{a.model}: {a.paid_calls} calls paid, {a.replayed_calls} from the journal, {a.failed_attempts} attempts "
        f"failed; {a.prompt_tokens:,} prompt tokens ({a.cached_tokens:,} cached), {a.completion_tokens:,} completion; "
        f"{a.money:.4f} {a.currency}{unsure}; at most {a.most_at_once} calls at once"
    )


def collect(params: Params) -> list[Spent]:
    """What all runs of this project have spent, a row for each stage and model; none where no model is served."""
    return spending(ledger_file()) if calls_endpoint(params) else []
