"""How much memory LoRA SFT of a model takes, before it is fetched: from its architecture, without its weights.

Parameters are counted on the meta device. Activations are *measured*: one training forward of the same architecture
with one and with two layers at a fraction of its width, on this machine, scaled up (all of them grow with the width).
Knows no data; assumes bfloat16 and that attention keeps no quadratic matrix.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from ragdistill.errors import ConfigError
from ragdistill.params import LoraParams
from ragdistill.training.fast import LOGIT_ROWS, fuse_lora

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHRINK = 16
"""The measured model has this fraction of the width; heads become narrower, not fewer."""
_LEAST_HEAD = 2
"""Width of a head: rotary positions turn pairs. Only of models that are toys already."""
TOKENS = 256
"""Of the forward that is measured."""
_ADAPTER_BYTES = 16.0
"""A trained parameter: float32 weight, gradient and two Adam moments."""
_NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""A weight in 4 bits, with its share of 8-bit block scales and of their own scales."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one training; `total` leaves out the driver's context and fragmentation (about a tenth more)."""

    parameters: int
    trained: int
    """Parameters of the adapter."""
    base: float
    adapter: float
    """Weights, gradients and optimiser of the adapter."""
    activations_per_token: float
    recomputed_per_token: float
    """Instead, with gradient checkpointing: each layer's input and the activations of one layer."""
    tokens: int
    """Of the largest micro-batch."""
    logits: float
    checkpointing: bool = False
    """Whether layers are recomputed, so that `recomputed_per_token` is what `activations` counts."""

    @property
    def per_token(self) -> float:
        """Bytes of activations a token, as it is trained."""
        return self.recomputed_per_token if self.checkpointing else self.activations_per_token

    @property
    def host(self) -> float:
        """Bytes of host memory to load the base in float32, as it is when an adapter is merged into it."""
        return 4.0 * self.parameters

    @property
    def activations(self) -> float:
        return self.per_token * self.tokens

    @property
    def total(self) -> float:
        return self.base + self.adapter + self.activations + self.logits


def architecture(spec: str) -> PretrainedConfig:
    """The configuration of a local model directory, or of a Hugging Face id that `architectures.json` knows."""
    from transformers import AutoConfig

    if (Path(spec) / "config.json").is_file():
        return AutoConfig.from_pretrained(spec, trust_remote_code=False, local_files_only=True)
    known = msgspec.json.decode((files("ragdistill.training") / "architectures.json").read_bytes())
    if spec.partition("@")[0] not in known:
        raise ConfigError(f"The architecture of {spec} is not known here; name its directory, or one of {list(known)}.")
    return AutoConfig.for_model(**known[spec.partition("@")[0]])


def narrowed(config: PretrainedConfig, layers: int, shrink: int = SHRINK, vocabulary: int = 256) -> PretrainedConfig:
    """The same architecture with less width, fewer layers and a small vocabulary."""
    small: Any = type(config)(**config.to_dict())
    small.num_hidden_layers, small.vocab_size = layers, vocabulary
    small.intermediate_size = max(1, config.intermediate_size // shrink)
    small.hidden_size = max(_LEAST_HEAD * config.num_attention_heads, config.hidden_size // shrink)
    if getattr(small, "head_dim", None):
        small.head_dim = max(_LEAST_HEAD, small.head_dim // shrink // _LEAST_HEAD * _LEAST_HEAD)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    return small


def estimate(spec: str, lora: LoraParams, quantize: str, tokens: int, checkpointing: bool = False) -> Memory:
    """Memory of training `spec` with micro-batches of up to `tokens` tokens. `ConfigError` if it is not known."""
    from transformers import AutoModelForCausalLM

    config = architecture(spec)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    trained = sum(lora.r * (m.in_features + m.out_features) for m in linear)
    frozen = sum(m.weight.numel() for m in linear) if quantize == "nf4" else 0
    one, two = (_measured(spec, layers, max(1, lora.r // SHRINK), lora.dropout) for layers in (1, 2))
    layer = (two - one) * SHRINK / TOKENS
    rest = (one - (two - one)) * SHRINK / TOKENS
    return Memory(
        parameters=parameters, trained=trained, base=_NF4_BYTES * frozen + 2.0 * (parameters - frozen),
        adapter=_ADAPTER_BYTES * trained, activations_per_token=layer * config.num_hidden_layers + rest, tokens=tokens,
        recomputed_per_token=2.0 * config.hidden_size * config.num_hidden_layers + layer + rest,
        logits=3 * 4.0 * LOGIT_ROWS * config.vocab_size, checkpointing=checkpointing,
    )  # fmt: skip


@cache
def _measured(spec: str, layers: int, rank: int, dropout: float) -> int:
    return saved_bytes(narrowed(architecture(spec), layers), rank, dropout)


def saved_bytes(config: PretrainedConfig, rank: int, dropout: float) -> int:
    """Bytes that a training forward over `TOKENS` tokens keeps for the backward, parameters aside."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapter = LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, adapter)
    fuse_lora(wrapped)
    wrapped.train()
    known = {p.untyped_storage().data_ptr() for p in wrapped.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # keeps addresses from being used again

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(saved)
        return saved

    causal = wrapped.get_base_model()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        getattr(causal, causal.base_model_prefix)(input_ids=torch.zeros((1, TOKENS), dtype=torch.long), use_cache=False)
    return sum(kept.values())
