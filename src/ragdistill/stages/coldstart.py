"""Stage `coldstart`: trains the raw model on the demonstrations; the merged result is the base of all policies."""

from __future__ import annotations

import shutil
from pathlib import Path

from ragdistill.journal import cache_dir
from ragdistill.llm import cpu_env
from ragdistill.llm.weights import save_merged
from ragdistill.params import Params
from ragdistill.records import SftExample, read_jsonl
from ragdistill.stages.common import BASE, DEMOS, RAW, link_tree, run_stage, training_line

ADAPTER = Path(".cache/coldstart")
"""Of this workspace, also where experiments that run at once share the rest."""


def body(params: Params) -> str:
    if not params.coldstart.enabled:
        link_tree(RAW, BASE)
        return "skipped: the base is the raw model (coldstart.enabled is false)"
    cpu_env.apply()
    from ragdistill.training.once import train_once

    result = train_once(
        read_jsonl(DEMOS, SftExample), RAW, ADAPTER, params.coldstart.lora, params.seed, cache_dir(),
        params.sft.checkpoint_steps, training=params.training,
    )  # fmt: skip
    save_merged(RAW, ADAPTER, BASE, "coldstart")
    for name in ("training.json", "loss.csv"):
        shutil.copy(ADAPTER / name, BASE / f"coldstart_{name}")
    return training_line(result)


if __name__ == "__main__":
    run_stage("coldstart", body)
