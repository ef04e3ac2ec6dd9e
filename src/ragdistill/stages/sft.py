"""Stage `sft@VARIANT-SEED`: a LoRA student of one training set and one training seed."""

from __future__ import annotations

from ragdistill.journal import cache_dir
from ragdistill.params import Params
from ragdistill.records import SftExample, read_jsonl
from ragdistill.stages.common import BASE, SFT, STUDENTS, item, run_stage


def body(params: Params, variant: str, seed: int) -> str:
    from ragdistill.training.sft import train_lora

    result = train_lora(
        read_jsonl(SFT / f"{variant}.jsonl", SftExample), BASE, STUDENTS / f"{variant}-{seed}",
        params.sft.lora, seed, checkpoint_dir=cache_dir("checkpoints"), checkpoint_steps=params.sft.checkpoint_steps,
    )  # fmt: skip
    return result.line()


if __name__ == "__main__":
    name = item()
    variant, _, seed = name.rpartition("-")
    run_stage(f"sft@{name}", lambda params: body(params, variant, int(seed)))
