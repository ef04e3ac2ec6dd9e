"""Run one engine step through a model: flat token ids in, logits of the asked rows out.

Any Hugging Face causal model with plain full attention runs, through transformers' attention interface.
This module knows no conversation and no sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ragdistill.errors import ConfigError
from ragdistill.llm.kv_cache import BLOCK, PagedCache, Plan
from ragdistill.llm.packed import pack_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "ragdistill_paged"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


def paged_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over a `PagedCache`: query (1, heads, tokens, dim)."""
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked or attention_mask is not None:
        raise ConfigError(f"The local engine does not do attention with {asked or 'masks'}; serve it by an endpoint.")
    cache: PagedCache = kwargs["paged_cache"]
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return cache.attend(module.layer_idx, q, k, v, kwargs["paged_plan"], scale)[None], None


class HuggingFaceRunner:
    """Steps of `model`, generic over architectures."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        """Prepare a KV cache of `tokens`; `ConfigError` for architectures that need another kind of cache."""
        from transformers import AttentionInterface

        config: Any = model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or not getattr(model, "_supports_attention_backend", False):
            raise ConfigError(f"The local engine cannot run {config.model_type} ({kinds}); serve it by an endpoint.")
        AttentionInterface.register(ATTENTION, paged_attention)
        model.set_attn_implementation(ATTENTION)
        pack_linears(model)
        self._model: Any = model
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.cache = PagedCache(config.num_hidden_layers, -(-tokens // BLOCK), kv_heads, heads, dim, model.dtype)

    def step(self, ids: torch.Tensor, plan: Plan, rows: torch.Tensor) -> torch.Tensor:
        """Float32 logits (len(rows), vocabulary) of the flat tokens `rows`."""
        out = self._model(
            input_ids=ids[None], position_ids=plan.positions[None], use_cache=False, logits_to_keep=rows,
            paged_cache=self.cache, paged_plan=plan,
        )  # fmt: skip
        return out.logits[0].float()
