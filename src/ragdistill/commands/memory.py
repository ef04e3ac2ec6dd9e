"""`ragdistill memory [PROFILE]`: what training needs on a GPU, and the host, before anything is fetched or spent."""

from __future__ import annotations

from ragdistill import profiles
from ragdistill.llm import cpu_env
from ragdistill.params import load_params
from ragdistill.stages.common import quiet_libraries


def show_memory(profile: str | None) -> int:
    """Print what params.yaml, or PROFILE in its place, needs: parts and sum of a training, host memory of merging."""
    params = profiles.overlaid(profile) if profile else load_params()
    quiet_libraries()
    cpu_env.apply()
    from ragdistill.training.hardware import HEADROOM, MICRO_TOKENS
    from ragdistill.training.memory import estimate

    lora, recipe, setting = params.sft.lora, params.sft.recipe, params.training.checkpointing
    longest = lora.max_tokens
    m = estimate(params.model.base, lora, recipe.quantize, max(MICRO_TOKENS["cuda"], longest), setting is True)
    fixed, other = m.total - m.activations, m.activations_per_token if m.checkpointing else m.recomputed_per_token
    kind = "4 bits (nf4)" if recipe.quantize == "nf4" else "bfloat16"
    kept = "layers recomputed (training.checkpointing)" if m.checkpointing else "all layers kept"
    rows = [
        ("base, frozen", m.base, f"{m.parameters / 1e9:.2f} B parameters in {kind}"),
        ("adapter", m.adapter, f"{m.trained / 1e6:.0f} M parameters, rank {lora.r}: weights, gradients, Adam"),
        ("activations", m.activations, f"{m.tokens:,} tokens a micro-batch, {m.per_token / 1e6:.2f} MB each, {kept}"),
        ("logits", m.logits, "at trained positions only, by blocks"),
        ("sum", m.total, "and about a tenth more for driver and fragmentation"),
        ("one example", fixed + m.per_token * longest, f"the sum at sft.lora.max_tokens = {longest:,}"),
        (
            "kept" if m.checkpointing else "recomputed", fixed + other * longest,
            f"the same with training.checkpointing={str(not m.checkpointing).lower()}",
        ),
        ("host memory", m.host, "RAM, to merge in float32 what the torch engine plays; `export` takes twice that"),
    ]  # fmt: skip
    print(f"{params.model.base}, students of {profile or 'params.yaml'} on one GPU:")
    for name, size, what in rows:
        print(f"  {name:<17}{size / 1e9:>7.1f} GB  {what}")
    if setting == "auto":
        least, all_at_once = ((fixed + m.per_token * n) / HEADROOM / 1e9 for n in (longest, m.tokens))
        print(
            f"  training.checkpointing=auto takes smaller micro-batches on GPUs below {all_at_once:.0f} GB, and "
            f"recomputes layers below {least:.0f} GB"
        )
    return 0
