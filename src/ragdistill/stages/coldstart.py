"""Stage `coldstart`: trains the raw model on the demonstrations; the merged result is the base of all policies."""

from __future__ import annotations

import shutil

from ragdistill.journal import cache_dir
from ragdistill.llm.weights import save_merged
from ragdistill.params import Params
from ragdistill.records import SftExample, read_jsonl
from ragdistill.stages.common import BASE, DEMOS, RAW, link_tree, run_stage


def body(params: Params) -> str:
    if not params.coldstart.enabled:
        link_tree(RAW, BASE)
        return "skipped: the base is the raw model (coldstart.enabled is false)"
    from ragdistill.training.sft import train_lora

    adapter = cache_dir("coldstart", "adapter")
    shutil.rmtree(adapter, ignore_errors=True)
    result = train_lora(
        read_jsonl(DEMOS, SftExample), RAW, adapter, params.coldstart.lora, params.seed,
        checkpoint_dir=cache_dir("checkpoints"), checkpoint_steps=params.sft.checkpoint_steps,
    )  # fmt: skip
    save_merged(RAW, adapter, BASE, "coldstart")
    for name in ("training.json", "loss.csv"):
        shutil.copy(adapter / name, BASE / f"coldstart_{name}")
    return result.line()


if __name__ == "__main__":
    run_stage("coldstart", body)
