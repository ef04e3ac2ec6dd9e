"""What a training runs on and how: device, precision, attention, packing, checkpointing, number of processes.

All of it changes speed and memory, and results by rounding alone; so none of it is part of an adapter's address.
Knows an architecture and a machine; knows no data and no trainer.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import msgspec
import torch

from ragdistill.errors import ConfigError
from ragdistill.params import LoraParams, TrainingParams
from ragdistill.training.fast import attention_for

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

AUTO = TrainingParams(launch="auto", processes=None, checkpointing="auto", attention="auto", packing="auto")
"""As shipped: one process and nothing special on a CPU."""
FLASH = "flash_attention_2"
"""transformers' name of the flash-attn package."""
MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens per micro-batch: enough to fill the device, and it bounds the memory of activations."""
HEADROOM = 0.9
"""Share of a GPU that a training may take by the estimate; the rest is for the driver and fragmentation."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How one training runs here."""

    device: str
    """cpu or cuda."""
    precision: torch.dtype
    """Of the frozen base."""
    attention: str
    """Name in transformers' attention registry."""
    packing: bool = False
    checkpointing: bool = False

    @property
    def micro_tokens(self) -> int:
        """Tokens per micro-batch, padding included."""
        return MICRO_TOKENS[self.device]


def precision_for(device: str) -> torch.dtype:
    """bfloat16 for the frozen base where the hardware has it; emulated, it would be slower than float32."""
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def plan(training: TrainingParams, base: Path, lora: LoraParams, quantize: str = "none") -> Plan:
    """How to train `base` on this machine, as `training` asks; `ConfigError` for what it cannot do."""
    from transformers import AutoConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
    precision = precision_for(device)
    flash = find_spec("flash_attn") is not None and precision == torch.bfloat16
    attention, packing = attention_and_packing(training, config, device, flash)
    checkpointing = training.checkpointing
    if checkpointing == "auto":
        memory = torch.cuda.mem_get_info()[1] if device == "cuda" else None
        checkpointing = memory is not None and too_small(memory, str(base), lora, quantize)
    return Plan(
        device=device, precision=precision, attention=attention, packing=packing, checkpointing=bool(checkpointing)
    )


def attention_and_packing(
    training: TrainingParams, config: PretrainedConfig, device: str, flash: bool
) -> tuple[str, bool]:
    """Attention implementation, and whether examples share rows. `flash`: flash-attn is installed and can be used.

    Packed rows go with implementations that keep examples apart by their positions; our blocks do not. `ConfigError`
    when flash attention is asked for and not to be had.
    """
    if training.attention == FLASH and not (flash and device == "cuda"):
        raise ConfigError(
            "training.attention is flash_attention_2, which needs a CUDA device with bfloat16 and the package "
            "flash-attn; set it to auto."
        )
    if training.attention != "auto":
        attention = training.attention
    elif device == "cuda" and flash:
        attention = FLASH
    else:
        attention = "sdpa" if training.packing is True else attention_for(config, device)
    return attention, attention == FLASH if training.packing == "auto" else training.packing


def too_small(memory: int, base: str, lora: LoraParams, quantize: str) -> bool:
    """Whether a GPU of `memory` bytes would not hold the largest micro-batch if every layer's activations were kept."""
    from ragdistill.training.memory import estimate

    needed = estimate(base, lora, quantize, max(MICRO_TOKENS["cuda"], lora.max_tokens))
    return needed.total > HEADROOM * memory


def processes(training: TrainingParams, quantize: str = "none") -> int:
    """How many processes train together. `ConfigError` for what cannot be: more than GPUs, sharding without GPUs."""
    visible = torch.cuda.device_count()
    if training.launch == "one":
        return 1
    count = training.processes or max(1, visible)
    if visible and count > visible:
        raise ConfigError(f"training.processes is {count}, but {visible} GPUs are visible; lower it, or set null.")
    if count > 1 and training.launch == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError("training.launch is deepspeed, which is not installed; install it, or set launch: fsdp.")
    if count > 1 and training.launch != "auto" and not visible:
        raise ConfigError(f"training.launch is {training.launch}, which needs GPUs; set it to auto.")
    if count > 1 and training.launch != "auto" and quantize != "none":
        raise ConfigError(
            f"training.launch is {training.launch}, which shards no base in 4 bits (quantize is {quantize}); "
            "set launch: auto, by which each GPU holds it whole, or quantize: none."
        )
    return count
