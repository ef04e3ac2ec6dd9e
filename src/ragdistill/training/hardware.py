"""What a training runs on and how: device, precision, attention, packing, checkpointing, number of processes.

All of it changes speed and memory, and results by rounding alone; so none of it is part of an adapter's address.
Knows an architecture and a machine; knows no data and no trainer.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import msgspec
import torch

from ragdistill.errors import ConfigError
from ragdistill.params import LoraParams, TrainingParams
from ragdistill.training.encode import BUCKET, padded
from ragdistill.training.fast import attention_for

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

AUTO = TrainingParams(launch="auto", processes=None, checkpointing="auto", attention="auto", packing="auto")
"""As shipped: one process and nothing special on a CPU."""
FLASH = "flash_attention_2"
"""transformers' name of the flash-attn package."""
MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Most padded tokens per micro-batch: enough to fill the device, and it bounds the memory of activations."""
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
    room: int | None = None
    """Tokens that memory has room for at once; None where they are not counted."""

    @property
    def micro_tokens(self) -> int:
        """Tokens per micro-batch, padding included."""
        return self.room or MICRO_TOKENS[self.device]


def precision_for(device: str) -> torch.dtype:
    """bfloat16 for the frozen base where the hardware has it; emulated, it would be slower than float32."""
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def plan(
    training: TrainingParams, base: Path, lora: LoraParams, quantize: str = "none", longest: int | None = None
) -> Plan:
    """How to train `base` on this machine, as `training` asks; `ConfigError` for what it cannot do.

    `longest`: tokens of the longest example, if it is known; else what `lora` allows.
    """
    from transformers import AutoConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
    precision = precision_for(device)
    flash = find_spec("flash_attn") is not None and precision == torch.bfloat16
    attention, packing = attention_and_packing(training, config, device, flash)
    checkpointing, room = training.checkpointing is True, None
    if device == "cuda":
        memory = min(  # of all GPUs here, so that every process plans alike
            torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
        )
        asked = training.checkpointing
        checkpointing, room = fitting(memory, str(base), lora, quantize, longest or lora.max_tokens, asked)
    return Plan(
        device=device, precision=precision, attention=attention, packing=packing, checkpointing=checkpointing, room=room
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


def fitting(
    memory: int, base: str, lora: LoraParams, quantize: str, longest: int, checkpointing: bool | Literal["auto"]
) -> tuple[bool, int]:
    """Whether layers are computed twice, and tokens per micro-batch, on a GPU of `memory` bytes by the estimate.

    Smaller micro-batches come first, as long as they hold the `longest` example: they cost less than a third more
    computation. An example that does not fit at all is tried: the estimate is none to refuse by.
    """
    from ragdistill.training.memory import estimate

    most, recomputed = MICRO_TOKENS["cuda"], checkpointing is True
    for recomputed in (False, True) if checkpointing == "auto" else (checkpointing,):
        needed = estimate(base, lora, quantize, most, recomputed)
        free = HEADROOM * memory - (needed.total - needed.activations)
        room = min(most, int(free / needed.per_token) // BUCKET * BUCKET)
        if room >= padded(longest):
            return recomputed, room
    return recomputed, padded(longest)


def processes(training: TrainingParams, quantize: str = "none") -> int:
    """How many processes train together. `ConfigError` for what cannot be: more than GPUs, sharding without GPUs.

    Where there is one only, `launch` has nothing to decide: `unheeded` says so.
    """
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


def unheeded(training: TrainingParams, count: int) -> str:
    """One sentence where `training.launch` asks for a sharding that `count` processes do not have; else ""."""
    if count > 1 or training.launch not in ("fsdp", "deepspeed"):
        return ""
    return f"training.launch is {training.launch}, which needs several GPUs: one process trains, nothing is sharded."
