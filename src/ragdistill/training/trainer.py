"""TRL's `SFTTrainer` with one loss per optimiser batch, logits at trained positions only, and whole checkpoints.

Knows tensors and a model; knows neither chats nor where results go.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ragdistill.errors import ConfigError
from ragdistill.files import write_atomic
from ragdistill.llm.weights import check_model_dir
from ragdistill.params import LoraParams
from ragdistill.training.encode import IGNORE, Collator, Corpus
from ragdistill.training.fast import attention_for, fuse_lora, head_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int, float, float], None]
"""Called after each optimiser step with (step, steps, loss, tokens per second)."""

COMPLETE = "complete"
"""Marker written last into a checkpoint, so its existence means that the checkpoint was saved whole."""
MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens per micro-batch: enough to fill the device, and it bounds the memory of activations."""


def precision_for(device: str) -> torch.dtype:
    """bfloat16 for the frozen base where the hardware has it; emulated, it would be slower than float32."""
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def load_base(base_dir: Path, precision: torch.dtype, device: str, quantize: str = "none") -> PreTrainedModel:
    """The frozen base for training, in 4 bits with `quantize` nf4.

    `ConfigError` when the model alters its logits, which the loss would miss, or 4 bits are not to be had here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model_dir(base_dir)
    config = AutoConfig.from_pretrained(str(base_dir), trust_remote_code=False, local_files_only=True)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1.0):
            raise ConfigError(f"The base model sets `{name}`, which training does not support; choose another base.")
    return AutoModelForCausalLM.from_pretrained(
        str(base_dir), dtype=precision, attn_implementation=attention_for(config, device),
        use_safetensors=True, trust_remote_code=False, local_files_only=True, **_in_4_bits(precision, device, quantize),
    )  # fmt: skip


def _in_4_bits(precision: torch.dtype, device: str, quantize: str) -> dict[str, Any]:
    """Loading options of QLoRA (arXiv 2305.14314): NF4 with double quantisation; none without `quantize`."""
    if quantize == "none":
        return {}
    if device != "cuda" or find_spec("bitsandbytes") is None:
        what = "a CUDA device" if device != "cuda" else "the package bitsandbytes"
        raise ConfigError(f"sft.recipe.quantize is {quantize}, which needs {what}; install it or set quantize: none.")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision,
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}


def training_arguments(
    lora: LoraParams,
    seed: int,
    place: Path,
    examples: int,
    save_steps: int | None,
    device: str,
) -> SFTConfig:
    """TRL's settings. `examples` decides the number of steps; without `save_steps` no checkpoint is written."""
    steps = math.ceil(examples / lora.batch) * lora.epochs
    return SFTConfig(
        output_dir=str(place), seed=seed, data_seed=seed, use_cpu=device == "cpu",
        num_train_epochs=lora.epochs, per_device_train_batch_size=lora.batch, gradient_accumulation_steps=1,
        learning_rate=lora.lr, lr_scheduler_type="linear", warmup_steps=math.ceil(lora.warmup * steps),
        weight_decay=lora.weight_decay, optim="adamw_torch_fused",
        logging_steps=1, report_to="none", disable_tqdm=True, logging_nan_inf_filter=False,
        save_strategy="steps" if save_steps else "no", save_steps=save_steps or 1, save_total_limit=2,
        max_length=None, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
        # the base is loaded in the precision it is trained in, so no autocast; checkpointing trades speed for memory
        bf16=False, gradient_checkpointing=False, dataloader_pin_memory=device == "cuda",
    )  # fmt: skip


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    lora: LoraParams,
    args: SFTConfig,
    micro_tokens: int,
) -> TokenLossTrainer:
    """The trainer with LoRA on all attention and MLP linear layers (TRL seeds before it draws the adapter)."""
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    pad: Any = tokenizer.pad_token_id  # any id does: padding is never attended to and never learnt
    trainer = TokenLossTrainer(
        model=model, args=args, train_dataset=corpus.dataset(), processing_class=tokenizer, peft_config=config,
        data_collator=Collator(micro_tokens, pad or 0), callbacks=[_MarkComplete()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    fuse_lora(trainer.accelerator.unwrap_model(trainer.model))
    return trainer


class TokenLossTrainer(SFTTrainer):
    """`SFTTrainer` whose optimiser batch is a list of micro-batches, with one loss: the mean over trained tokens.

    Each micro-batch is divided by the trained tokens of the whole optimiser batch, so how it is cut changes
    nothing. Logits are computed at trained positions only; TRL's entropy and accuracy are not computed at all.
    """

    smoothing = 0.0
    """Share of the target that is spread over all tokens."""
    _step_started = 0.0
    _step_tokens = 0

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Forward and backward of one optimiser batch; returns its mean loss per trained token."""
        self._step_started = time.perf_counter()
        model.train()
        prepared: Any = self._prepare_inputs(inputs)
        micro: list[dict[str, torch.Tensor]] = prepared["micro"]
        self._step_tokens = sum(int(m["lengths"].sum()) for m in micro)
        trained = sum(int((m["labels"][:, 1:] != IGNORE).sum()) for m in micro)
        total = torch.zeros((), device=self.args.device)
        for batch in micro:
            loss = self.compute_loss(model, batch, num_items_in_batch=trained)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = 1
    ) -> torch.Tensor:
        """Summed loss of one micro-batch divided by `num_items_in_batch`, the trained tokens of the whole batch."""
        causal: Any = self.accelerator.unwrap_model(model)
        causal = causal.get_base_model()
        backbone = getattr(causal, causal.base_model_prefix)
        hidden = backbone(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state[:, :-1]
        targets = inputs["labels"][:, 1:]
        learnt = targets != IGNORE
        head = causal.get_output_embeddings().weight
        return head_loss(hidden[learnt], head, targets[learnt], self.smoothing) / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the time and the speed of the optimiser step to its log entry."""
        if "loss" in logs:
            logs["step_seconds"] = time.perf_counter() - self._step_started
            logs["tokens_per_second"] = self._step_tokens / logs["step_seconds"]
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: transformers would count padding and full logits."""
        return 0

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None is written: it would hold paths of this machine."""


class ProgressCallback(TrainerCallback):
    """Reports each optimiser step to a function."""

    def __init__(self, report: Progress) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the trainer after each log entry."""
        if logs and "loss" in logs:
            self._report(state.global_step, state.max_steps, logs["loss"], logs["tokens_per_second"])


class _MarkComplete(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        write_atomic(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, b"")


def latest_checkpoint(place: Path) -> Path | None:
    """The newest checkpoint under `place` that was saved whole; half-written ones are deleted."""
    found: list[tuple[int, Path]] = []
    for path in place.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            found.append((int(path.name.removeprefix("checkpoint-")), path))
        else:
            shutil.rmtree(path)
    return max(found)[1] if found else None
