"""A step of LoRA SFT at scale: `python benchmarks/sft_scale.py`, on CUDA; `--toy` on a CPU, at a fraction of the width.

The architecture of Qwen2.5-7B with random weights, frozen in bfloat16, LoRA on all linear layers, on chats of random
tokens as long as episodes are, with padded and with packed rows; through the trainer that the stages use. Prints one
table: tokens per second (real ones, without padding), MFU, peak memory.

MFU, model FLOPs utilisation, is (tokens per second × FLOPs a token needs) / peak FLOPs per second, as in appendix B of
PaLM (arXiv 2204.02311). There a token needs 6 N + 12 L H Q T: N parameters, L layers, H heads of width Q, T tokens a
sequence, the causal mask not discounted, and recomputation not counted. Here, since the base is frozen, its weights
have no gradients, and logits are made at trained positions only:

    4 N + 6 A + 4 s V D + 12 L H Q T

N: parameters of the linear layers, A: of the adapter, s: share of trained tokens, V D: size of the head; T is the
mean over tokens of their sequence's length.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ragdistill.params import LoraParams, TrainingParams
from ragdistill.training import hardware, memory
from ragdistill.training.encode import IGNORE, Corpus, Encoded
from ragdistill.training.trainer import build_trainer, training_arguments

SPEC = "Qwen/Qwen2.5-7B-Instruct"
LORA = LoraParams(
    r=64, alpha=128, dropout=0.1, lr=2e-4, epochs=1, batch=8, warmup=0.1, weight_decay=0.01, max_tokens=12000
)
TURNS = (14, 19, 25, 25, 25, 31, 50)
"""Turns an episode, of 90 tokens each; an eighth of them with `--toy`."""
TURN, REPLY = 90, 30
WARM = 2
"""First steps that are not counted: kernels are chosen and memory is taken."""
PEAK = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165.2e12}
"""Dense bfloat16 FLOPs per second by the vendor's data sheets, by a part of the device's name."""


class Row(NamedTuple):
    """One line of the table."""

    name: str
    at_once: int
    """Most tokens of a micro-batch, as memory has room for them."""
    tokens_per_second: float
    mfu: float
    peak_memory: float
    """Bytes: on CUDA of tensors, on a CPU of the whole process so far."""
    seconds: float
    """A step."""
    padding: float
    """Share of what goes through the model."""


def chats(rng: random.Random, count: int, vocabulary: int, toy: bool) -> Corpus:
    """Random tokens in turns; of each turn the last third is learnt."""
    turn, reply = (TURN // 8, REPLY // 8) if toy else (TURN, REPLY)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(vocabulary) for _ in range(rng.choice(TURNS) * turn)]
        rows.append(Encoded(ids, [t if i % turn >= turn - reply else IGNORE for i, t in enumerate(ids)]))
    return Corpus(rows, 0)


def flops_per_token(model: Any, corpus: Corpus) -> float:
    """What one token of `corpus` needs, forward and backward; see the module's docstring."""
    config, adapter = model.config, sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = model.get_output_embeddings()
    layers = (m for name, m in model.named_modules() if "lora" not in name and m is not head)
    weights = sum(m.weight.numel() for m in layers if isinstance(m, torch.nn.Linear))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = sum(len(row.ids) ** 2 for row in corpus.rows) / corpus.tokens
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * width * length
    return 4 * weights + 6 * adapter + 4 * corpus.trained_tokens / corpus.tokens * head.weight.numel() + attention


def peak_flops(device: str, precision: torch.dtype) -> tuple[float, str]:
    """Peak FLOPs per second and where the number is from: a data sheet, or a product of two matrices measured here."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    for part, flops in PEAK.items():
        if part in name:
            return flops, f"{name}, data sheet"
    size, best = (8192, 0.0) if device == "cuda" else (1024, 0.0)
    a = torch.randn(size, size, device=device).to(precision)
    for _ in range(4):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best, f"{name}, measured: a product of {size} x {size} matrices"


def tokenizer() -> Any:
    """TRL wants one; it reads nothing here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


def measure(how: hardware.Plan, config: Any, corpus: Corpus, peak: float, out: Path) -> Row:
    """Train one epoch of `corpus` and take the time of its steps."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(how.device):
        model = AutoModelForCausalLM.from_config(config, dtype=how.precision, attn_implementation=how.attention)
    args = training_arguments(LORA, 0, out, len(corpus.rows), None, how)
    trainer = build_trainer(model, tokenizer(), corpus, LORA, args, how.micro_tokens, how.packing)
    needed = flops_per_token(trainer.model, corpus)
    if how.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    steps = [row for row in trainer.state.log_history if "step_seconds" in row][WARM:]
    seconds = sum(row["step_seconds"] for row in steps)
    rate = sum(row["tokens_per_second"] * row["step_seconds"] for row in steps) / seconds
    through = sum(m["input_ids"].numel() for batch in trainer.get_train_dataloader() for m in batch["micro"])
    in_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used = torch.cuda.max_memory_allocated() if how.device == "cuda" else in_process
    name = f"{'packed' if how.packing else 'padded'}, {how.attention}{', recomputed' if how.checkpointing else ''}"
    return Row(
        name, how.micro_tokens, rate, rate * needed / peak, used, seconds / len(steps), 1 - corpus.tokens / through
    )


def plans(config: Any, device: str) -> list[hardware.Plan]:
    """Padded and packed, with the best attention there is for each; all activations kept, and layers computed twice."""
    from importlib.util import find_spec

    flash, longest = find_spec("flash_attn") is not None, TURN * max(TURNS)
    memory_bytes = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    precision, found = hardware.precision_for(device), []
    for packing in (False, True):
        for twice in (False, True):
            asked = TrainingParams(launch="one", processes=None, checkpointing=twice, attention="auto", packing=packing)
            attention, packed = hardware.attention_and_packing(asked, config, device, flash)
            room = hardware.fitting(memory_bytes, SPEC, LORA, "none", longest, twice)[1] if memory_bytes else None
            found.append(
                hardware.Plan(
                    device=device, precision=precision, attention=attention, packing=packed, checkpointing=twice,
                    room=room,
                )
            )  # fmt: skip
    return found


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="two layers at a 32nd of the width, on a CPU")
    parser.add_argument("--steps", type=int, default=10, help="counted optimiser steps of 8 chats")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("sft_scale: there is no CUDA device here; --toy runs the same on a CPU.")
    device = "cpu" if options.toy else "cuda"
    config = memory.architecture(SPEC)
    config = memory.narrowed(config, 2, 32) if options.toy else config
    corpus = chats(random.Random(0), (WARM + options.steps) * LORA.batch, config.vocab_size, options.toy)
    peak, source = peak_flops(device, hardware.precision_for(device))
    rows = []
    for how in plans(config, device):
        with tempfile.TemporaryDirectory() as out:
            rows.append(measure(how, config, corpus, peak, Path(out)))
        gc.collect()
        torch.cuda.empty_cache()
    model = f"{SPEC}{', 2 layers at a 32nd of the width' if options.toy else ''}, random weights"
    length, most = corpus.tokens / len(corpus.rows), peak / 1e12
    print(f"{model}; LoRA r {LORA.r}, {length:.0f} tokens a chat; peak {most:.2f} TFLOP/s ({source})\n")
    print("| rows | tokens at once | tokens/s | MFU % | peak memory GB | s a step | padding % |")
    print(f"|---|{'---:|' * 6}")
    for r in rows:
        memory_gb, share = f"{r.peak_memory / 1e9:.1f}", f"{100 * r.padding:.0f}"
        print(
            f"| {r.name} | {r.at_once:,} | {r.tokens_per_second:,.0f} | {100 * r.mfu:.2f} | {memory_gb} | "
            f"{r.seconds:.2f} | {share} |"
        )


if __name__ == "__main__":
    main()
