"""Stage `sft@VARIANT-SEED`: a LoRA student of one training set and one training seed."""

from __future__ import annotations

from ragdistill.journal import cache_dir
from ragdistill.llm import cpu_env
from ragdistill.params import Params
from ragdistill.records import SftExample, read_jsonl
from ragdistill.stages.common import BASE, SFT, STUDENTS, item, run_stage, training_line


def body(params: Params, variant: str, seed: int) -> str:
    cpu_env.apply()
    from ragdistill.training.once import train_once

    result = train_once(
        read_jsonl(SFT / f"{variant}.jsonl", SftExample), BASE, STUDENTS / f"{variant}-{seed}", params.sft.lora, seed,
        cache_dir(), params.sft.checkpoint_steps, recipe=params.sft.recipe,
        training=params.training,
    )  # fmt: skip
    return training_line(result)


if __name__ == "__main__":
    name = item()
    variant, _, seed = name.rpartition("-")
    run_stage(f"sft@{name}", lambda params: body(params, variant, int(seed)))
