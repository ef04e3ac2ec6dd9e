"""`ragdistill memory [PROFILE]`: what the students' training needs on a GPU, before anything is fetched or spent."""

from __future__ import annotations

from ragdistill import profiles
from ragdistill.llm import cpu_env
from ragdistill.params import load_params
from ragdistill.stages.common import quiet_libraries


def show_memory(profile: str | None) -> int:
    """Print parameters, adapter with optimiser, activations and their sum for params.yaml, or as PROFILE changes it."""
    params = profiles.overlaid(profile) if profile else load_params()
    quiet_libraries()
    cpu_env.apply()
    from ragdistill.training.memory import estimate
    from ragdistill.training.trainer import MICRO_TOKENS

    lora, recipe = params.sft.lora, params.sft.recipe
    longest = lora.max_tokens
    tokens = max(MICRO_TOKENS["cuda"], longest)
    m = estimate(params.model.base, lora, recipe.quantize, tokens)
    fixed = m.total - m.activations
    kind = "4 bits (nf4)" if recipe.quantize == "nf4" else "bfloat16"
    rows = [
        ("base, frozen", m.base, f"{m.parameters / 1e9:.2f} B parameters in {kind}"),
        ("adapter", m.adapter, f"{m.trained / 1e6:.0f} M parameters, rank {lora.r}: weights, gradients, Adam"),
        ("activations", m.activations, f"{tokens:,} tokens a micro-batch, {m.activations_per_token / 1e6:.2f} MB each"),
        ("logits", m.logits, "at trained positions only, by blocks"),
        ("sum", m.total, "and about a tenth more for driver and fragmentation"),
        ("one example", fixed + m.activations_per_token * longest, f"the sum at sft.lora.max_tokens = {longest:,}"),
        ("recomputed", fixed + m.recomputed_per_token * longest, "the same if layers were checkpointed"),
    ]
    print(f"{params.model.base}, students of {profile or 'params.yaml'} on one GPU:")
    for name, size, what in rows:
        print(f"  {name:<17}{size / 1e9:>7.1f} GB  {what}")
    return 0
