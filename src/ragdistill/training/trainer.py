"""TRL's `SFTTrainer` with one loss per optimiser batch, logits at trained positions only, and whole checkpoints.

Knows tensors and a model; knows neither chats nor where results go.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ragdistill.checks import no_4_bits
from ragdistill.errors import ConfigError
from ragdistill.files import write_atomic
from ragdistill.llm.weights import check_model_dir
from ragdistill.params import LoraParams
from ragdistill.training.encode import IGNORE, Collator, Corpus
from ragdistill.training.fast import fuse_lora, head_loss
from ragdistill.training.hardware import Plan
from ragdistill.training.share import Packer, Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int, float, float], None]
"""Called after each optimiser step with (step, steps, loss, tokens per second)."""

COMPLETE = "complete"
"""Marker written last into a checkpoint, so its existence means that the checkpoint was saved whole."""


def load_base(base_dir: Path, plan: Plan, quantize: str = "none") -> PreTrainedModel:
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
        str(base_dir), dtype=plan.precision, attn_implementation=plan.attention, use_safetensors=True,
        trust_remote_code=False, local_files_only=True, **_in_4_bits(plan.precision, plan.device, quantize),
    )  # fmt: skip


def _in_4_bits(precision: torch.dtype, device: str, quantize: str) -> dict[str, Any]:
    """Loading options of QLoRA (arXiv 2305.14314): NF4 with double quantisation; none without `quantize`."""
    if quantize == "none":
        return {}
    if lack := no_4_bits(quantize, device == "cuda"):
        raise ConfigError(lack)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision,
    )  # fmt: skip
    here = f"cuda:{torch.cuda.current_device()}"  # of several processes, each has its own
    return {"quantization_config": config, "device_map": {"": here}}


def training_arguments(
    lora: LoraParams, seed: int, place: Path, examples: int, save_steps: int | None, plan: Plan
) -> SFTConfig:
    """TRL's settings. `examples` decides the number of steps; without `save_steps` no checkpoint is written."""
    steps = math.ceil(examples / lora.batch) * lora.epochs
    args = SFTConfig(
        output_dir=str(place), seed=seed, data_seed=seed, use_cpu=plan.device == "cpu",
        num_train_epochs=lora.epochs, per_device_train_batch_size=lora.batch, gradient_accumulation_steps=1,
        learning_rate=lora.lr, lr_scheduler_type="linear", warmup_steps=math.ceil(lora.warmup * steps),
        weight_decay=lora.weight_decay, optim="adamw_torch_fused",
        logging_steps=1, report_to="none", disable_tqdm=True, logging_nan_inf_filter=False,
        save_strategy="steps" if save_steps else "no", save_steps=save_steps or 1, save_total_limit=2,
        max_length=None, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
        # the base is loaded in the precision it is trained in, so no autocast; DeepSpeed has a precision of its own
        bf16=sharding() == "deepspeed", dataloader_pin_memory=plan.device == "cuda",
        activation_checkpointing=plan.checkpointing, activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    if args.world_size == 1:
        args._n_gpu = min(1, args.n_gpu)  # one process trains on one GPU, never by DataParallel
    return args


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    lora: LoraParams,
    args: SFTConfig,
    micro_tokens: int,
    packing: bool = False,
) -> TokenLossTrainer:
    """The trainer with LoRA on all attention and MLP linear layers (TRL seeds before it draws the adapter)."""
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    pad: Any = tokenizer.pad_token_id  # any id does: padding is never attended to and never learnt
    cut = (Packer if packing else Collator)(micro_tokens, pad or 0)
    trainer = TokenLossTrainer(
        model=model, args=args, train_dataset=corpus.dataset(), processing_class=tokenizer, peft_config=config,
        data_collator=cut if args.world_size == 1 else Share(cut, args.process_index, args.world_size),
        callbacks=[_MarkComplete()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    wrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
    for p in wrapped.parameters():
        if p.requires_grad:  # TRL makes it bfloat16 on a base in 4 bits, where small steps would round to nothing
            p.data = p.data.float()
    if sharding() == "none":
        fuse_lora(wrapped)  # a sharded layer has its weights only while it is called itself
    lose(wrapped.get_base_model())
    if args.process_index:
        torch.manual_seed(args.seed + args.process_index)  # the adapter is drawn; dropout has to differ
    return trainer


def sharding() -> str:
    """What `accelerate launch` asked of this process: none, fsdp or deepspeed."""
    asked = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((name for name, variable in asked.items() if os.environ.get(variable) == "true"), "none")


def whole_adapter(trainer: TokenLossTrainer) -> dict[str, torch.Tensor] | None:
    """The adapter's weights, gathered where they are sharded (by all processes); None where each process has them."""
    if sharding() != "fsdp":
        return None
    from torch.distributed.tensor import DTensor

    model: Any = trainer.model
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for name, p in trained}


def lose(causal: Any) -> None:
    """Make the model's forward return its summed loss, and its head's forward the loss of the states it is given.

    So the loss is inside of what data parallelism wraps, and the head's weight is there where weights are sharded.
    """
    head = causal.get_output_embeddings()
    head.forward = types.MethodType(_head_forward, head)
    causal.forward = types.MethodType(_loss_forward, causal)


def _head_forward(head: Any, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    return head_loss(hidden, head.weight, targets, smoothing)


def _loss_forward(
    causal: Any, input_ids: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0, **inputs: Any
) -> torch.Tensor:
    positions = {k: v for k, v in inputs.items() if k == "position_ids"}
    backbone = getattr(causal, causal.base_model_prefix)
    hidden = backbone(input_ids=input_ids, use_cache=False, **positions).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    learnt = targets != IGNORE
    return causal.get_output_embeddings()(hidden[learnt], targets[learnt], smoothing)


class TokenLossTrainer(SFTTrainer):
    """`SFTTrainer` whose optimiser batch is a list of micro-batches, with one loss: the mean over trained tokens.

    Each micro-batch is divided by the trained tokens of the whole optimiser batch, so how it is cut changes
    nothing. Logits are computed at trained positions only; TRL's entropy and accuracy are not computed at all.
    """

    smoothing = 0.0
    """Share of the target that is spread over all tokens."""
    _step_started = 0.0
    _step_tokens = 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole optimiser batches in one process's order; several processes' collators each keep their share."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        data: Any = self.train_dataset
        collate: Any = self.data_collator
        loader = DataLoader(
            data, self.args.train_batch_size, sampler=self._get_train_sampler(data), collate_fn=collate,
            pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True,
            use_seedable_sampler=True, data_seed=self.args.data_seed,
        )  # fmt: skip

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Forward and backward of one optimiser batch; returns its mean loss per trained token.

        Of several processes each returns its share times their number, as their gradients and losses are averaged.
        """
        self._step_started = time.perf_counter()
        model.train()
        prepared: Any = self._prepare_inputs(inputs)
        micro: list[dict[str, torch.Tensor]] = prepared["micro"]
        self._step_tokens = prepared["tokens"]
        total = torch.zeros((), device=self.args.device)
        for left, batch in zip(range(len(micro) - 1, -1, -1), micro, strict=True):
            self.accelerator.sync_gradients = left == 0  # DeepSpeed steps where gradients are synchronised
            with self.accelerator.no_sync(model) if left else nullcontext():
                loss = self.compute_loss(model, batch, num_items_in_batch=prepared["trained"])
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = 1
    ) -> torch.Tensor:
        """Summed loss of one micro-batch divided by `num_items_in_batch`, the trained tokens of the whole batch."""
        loss = model(**inputs, smoothing=self.smoothing) / num_items_in_batch
        return loss if self.args.world_size == 1 else loss * self.args.world_size

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
        PartialState().wait_for_everyone()  # each process writes its part
        if state.is_world_process_zero:
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
