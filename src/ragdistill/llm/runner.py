"""Run one engine step through a model: flat token ids in, logits of the asked rows out.

Any Hugging Face causal model with plain full attention runs, through transformers' attention interface.
This module knows no conversation and no sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ragdistill.errors import ConfigError
from ragdistill.llm.choice import torch_refuses
from ragdistill.llm.kv_cache import BLOCK, PagedCache, Plan
from ragdistill.llm.packed import pack_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "ragdistill_paged"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")
_GPU_SHARE = 0.85
"""Of the GPU memory that is free beside the weights, for keys and values; the rest is for a step's activations."""


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

    def __init__(self, model: PreTrainedModel, conversations: int, context: int) -> None:
        """Prepare a KV cache, where the model is, for so many `conversations` of up to `context` tokens each.

        On a GPU as many of them as its memory holds (`self.conversations`). `ConfigError` when that is none, and for
        architectures that need another kind of cache.
        """
        from transformers import AttentionInterface

        config: Any = model.config
        refusal = torch_refuses(config, type(model))
        if refusal:
            raise ConfigError(refusal)
        AttentionInterface.register(ATTENTION, paged_attention)
        model.set_attn_implementation(ATTENTION)
        pack_linears(model)
        self._model: Any = model
        self.device: torch.device = model.device
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        tokens = context + BLOCK
        self.conversations = conversations
        if self.device.type == "cuda":
            free, per_token = _free(self.device), 2 * config.num_hidden_layers * kv_heads * dim * model.dtype.itemsize
            self.conversations = min(conversations, _fitting(free, tokens * per_token))
        blocks = -(-self.conversations * tokens // BLOCK)
        self.cache = PagedCache(config.num_hidden_layers, blocks, kv_heads, heads, dim, model.dtype, self.device)

    def step(self, ids: torch.Tensor, plan: Plan, rows: torch.Tensor) -> torch.Tensor:
        """Float32 logits (len(rows), vocabulary) of the flat tokens `rows`."""
        out = self._model(
            input_ids=ids[None], position_ids=plan.positions[None], use_cache=False, logits_to_keep=rows,
            paged_cache=self.cache, paged_plan=plan,
        )  # fmt: skip
        return out.logits[0].float()


def _free(device: torch.device) -> int:
    """Bytes of GPU memory that nothing uses."""
    return torch.cuda.mem_get_info(device)[0]


def _fitting(free: int, each: int) -> int:
    """How many conversations of `each` bytes fit; `ConfigError` if none does."""
    count = int(_GPU_SHARE * free) // each
    if count < 1:
        raise ConfigError(
            f"The GPU has {free / 1e9:.1f} GB left beside the weights, and the keys and values of one conversation "
            f"take {each / 1e9:.1f} GB; choose a smaller model, or serve it by an endpoint."
        )
    return count
