"""LoRA SFT: chats and a base model in, an adapter that knows its base out; a killed run resumes.

Only assistant tokens are learnt and nothing is truncated. Knows no policy, environment or hint. On a CPU start the
process with `OMP_WAIT_POLICY=PASSIVE` (read when torch is imported): spinning threads ruin a shared machine.
"""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from ragdistill.files import write_atomic
from ragdistill.llm import weights
from ragdistill.llm.chat_format import ChatFormat, load_tokenizer
from ragdistill.params import LoraParams, RecipeParams, TrainingParams
from ragdistill.records import SftExample, digest, read_json, write_json
from ragdistill.training.encode import OURS, Corpus, encode
from ragdistill.training.hardware import AUTO, Plan, plan
from ragdistill.training.trainer import (
    Progress,
    ProgressCallback,
    TokenLossTrainer,
    build_trainer,
    latest_checkpoint,
    load_base,
    sharding,
    training_arguments,
    whole_adapter,
)

FINAL_STEPS = 10
"""`final_loss` is the mean over this many last optimiser steps; a single step is noise."""


class Scale(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a training ran, where that was not in one process on a CPU, padded, with all activations kept."""

    processes: int = 1
    sharding: str = "none"
    attention: str = ""
    """On CUDA."""
    packing: bool = False
    checkpointing: bool = False


class SftResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one training was; written as `training.json` beside the adapter."""

    examples: int
    too_long: int
    """Examples that exceed `lora.max_tokens`: dropped whole, or cut where `recipe` says so."""
    tokens: int
    """Tokens of one epoch, read or learnt, without padding."""
    trained_tokens: int
    """Tokens of one epoch that carry loss."""
    steps: int
    seconds: float
    """Time in optimiser steps, summed over resumed runs."""
    tokens_per_second: float
    final_loss: float
    """Mean loss per trained token over the last `FINAL_STEPS` steps."""
    seed: int
    lora: LoraParams
    dtype: str
    """Precision of the frozen base while training; adapter and optimiser are float32 (DeepSpeed: float32 masters)."""
    data: str
    """Hash of the token ids and labels."""
    base: str
    """Fingerprint of the base model."""
    recipe: RecipeParams | None = None
    """Set where it is not `encode.OURS`."""
    scale: Scale | None = None
    """Set where it is not the plain one."""
    mute: int = 0
    """Cut examples that were dropped because nothing to learn was left of them."""


def train_lora(  # noqa: PLR0913 - what is trained, on what, where to, and how
    examples: Sequence[SftExample],
    base_dir: Path,
    out_dir: Path,
    lora: LoraParams,
    seed: int,
    checkpoint_dir: Path | None = None,
    checkpoint_steps: int = 50,
    progress: Progress | None = None,
    *,
    recipe: RecipeParams = OURS,
    training: TrainingParams = AUTO,
) -> SftResult:
    """Train an adapter for the model in `base_dir` and write it to `out_dir`, atomically (an old one is replaced).

    Checkpoints lie in `checkpoint_dir`, addressed by everything that decides the result, every `checkpoint_steps`
    optimiser steps, and are removed once the adapter is written; without `checkpoint_dir` a killed run starts anew.
    Raises `DataError` (too many examples too long, nothing to learn), `EmptyResultError`, `ConfigError`.
    """
    tokenizer = load_tokenizer(base_dir)
    corpus = encode(examples, ChatFormat(tokenizer), lora.max_tokens, recipe)
    how = plan(training, base_dir, lora, recipe.quantize, max(len(row.ids) for row in corpus.rows))
    key = digest(
        "sft", weights.model_fingerprint(base_dir), corpus.hash(), lora, seed, str(how.precision), *recipe_key(recipe)
    )
    with tempfile.TemporaryDirectory(prefix="sft-") as scratch:
        place = checkpoint_dir / key if checkpoint_dir else Path(scratch)
        save_steps = checkpoint_steps if checkpoint_dir else None
        args = training_arguments(lora, seed, place, len(corpus.rows), save_steps, how)
        if checkpoint_dir and sharding() != "none":  # its optimiser is kept in parts
            place = checkpoint_dir / digest(key, sharding(), args.world_size)
            args.output_dir = str(place)
        model = load_base(base_dir, how, recipe.quantize)
        trainer = build_trainer(model, tokenizer, corpus, lora, args, how.micro_tokens, how.packing)
        trainer.smoothing = recipe.label_smoothing
        if progress is not None and args.process_index == 0:
            trainer.add_callback(ProgressCallback(progress))
        with args.main_process_first(local=False):  # the first deletes what is half-written
            resume = latest_checkpoint(place)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        steps = [row for row in trainer.state.log_history if "step_seconds" in row]
        result = _result(corpus, steps, lora, seed, str(how.precision), weights.model_fingerprint(base_dir))
        result = msgspec.structs.replace(
            result, recipe=None if recipe == OURS else recipe, scale=_scale(how, args.world_size)
        )
        state = whole_adapter(trainer)  # takes all processes
        if args.process_index == 0:
            _write_adapter(trainer, state, base_dir, out_dir, result, steps)
            shutil.rmtree(place, ignore_errors=True)
    return result


def _scale(how: Plan, processes: int) -> Scale | None:
    scale = Scale(
        processes=processes, sharding=sharding(), packing=how.packing, checkpointing=how.checkpointing,
        attention=how.attention if how.device == "cuda" else "",
    )  # fmt: skip
    return None if scale == Scale() else scale


def recipe_key(recipe: RecipeParams) -> tuple[RecipeParams | str, ...]:
    """Part of an adapter's address; empty for our own recipe: that is where earlier adapters are."""
    cut = ("cut-2",) if recipe.too_long == "cut" else ()  # the first kept examples with nothing to learn
    return () if recipe == OURS else (recipe, *cut)


def _result(
    corpus: Corpus, steps: list[dict[str, float]], lora: LoraParams, seed: int, precision: str, base: str
) -> SftResult:
    seconds = sum(row["step_seconds"] for row in steps)
    last = [row["loss"] for row in steps[-FINAL_STEPS:]]
    return SftResult(
        examples=len(corpus.rows), too_long=corpus.too_long, mute=corpus.mute, tokens=corpus.tokens, steps=len(steps),
        trained_tokens=corpus.trained_tokens, seconds=round(seconds, 3), final_loss=sum(last) / len(last),
        tokens_per_second=round(corpus.tokens * lora.epochs / seconds, 1), seed=seed, lora=lora,
        dtype=precision.removeprefix("torch."), data=corpus.hash(), base=base,
    )  # fmt: skip


def _write_adapter(
    trainer: TokenLossTrainer,
    state: dict[str, torch.Tensor] | None,
    base_dir: Path,
    out_dir: Path,
    result: SftResult,
    steps: list[dict[str, float]],
) -> None:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as tmp:
        new = Path(tmp) / "adapter"
        model.save_pretrained(str(new), state_dict=state, save_embedding_layers=False)
        (new / "README.md").unlink(missing_ok=True)  # peft's model card holds the base's path
        config = read_json(new / "adapter_config.json")
        config["base_model_name_or_path"] = _base_name(base_dir, result.base)
        config["target_modules"] = sorted(config["target_modules"])  # a set: its order differs from run to run
        write_json(new / "adapter_config.json", config)
        write_json(new / "training.json", result)
        write_atomic(new / "loss.csv", _loss_csv(steps))
        weights.write_base_identity(new, base_dir)
        shutil.rmtree(out_dir, ignore_errors=True)
        new.rename(out_dir)


def _base_name(base_dir: Path, fingerprint: str) -> str:
    path = base_dir / weights.IDENTITY
    return str(read_json(path).get("name", fingerprint)) if path.is_file() else fingerprint


def _loss_csv(steps: list[dict[str, float]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", "epoch", "loss", "lr", "tokens_per_second"])
    for row in steps:
        loss, rate = f"{row['loss']:.6f}", f"{row['tokens_per_second']:.1f}"
        writer.writerow([row["step"], f"{row['epoch']:.4f}", loss, f"{row['learning_rate']:.3e}", rate])
    return out.getvalue().encode()
