"""LoRA SFT against TRL's plain default: tokens per second, held-out loss and peak memory.

    python benchmarks/sft_speed.py                  # the cold start's chats and settings, after `make run`
    python benchmarks/sft_speed.py --stage sft      # the distilled student's
    python benchmarks/sft_speed.py --model DIR --synthetic [--arms ours]     # made-up chats as long as episodes
Run it from the project's root, on a machine that does nothing else: about seven minutes on two cores. Arms:
  ours      what the pipeline calls: `training.sft.train_lora` with params.yaml's settings
  trl       `SFTTrainer(model, SFTConfig(…), LoraConfig(…))` as TRL documents it: float32 weights under bfloat16
            autocast, activations recomputed, batches padded to their longest chat
  trl-same  the same with the weights in the precision that ours has them in (`model_init_kwargs`)
  trl-kept  as trl-same, without recomputing activations: what TRL can be tuned to
All train on the same chats (checked: equal ids and labels) in the same batches with the same LoRA, learning rate,
schedule, steps and seed, with the loss on assistant tokens, and nothing cut off; TRL gets this project's process
settings (`llm.cpu_env`) too. Each run has a process of its own; every second round goes backwards. Seconds are those
of `Trainer.train`, from the first batch to the last step; tokens are those of the chats, padding not counted.
Held-out loss: the adapter merged in float32, mean over the assistant tokens of chats that nobody trained on.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from plain_training import corpus, train_with_trl

from ragdistill.llm import cpu_env
from ragdistill.params import LoraParams, load_params
from ragdistill.records import Message, SftExample, read_jsonl
from ragdistill.stages.common import BASE, DEMOS, RAW, SFT, quiet_libraries

ARMS = {
    "ours": "this project",
    "trl": "TRL, its defaults",
    "trl-same": "TRL, weights as ours",
    "trl-kept": "TRL, as ours, activations kept",
}
BAR, MEMORY, TOLERANCE = 1.4, 8.0, 0.02
"""At least so many times the tokens/s of TRL's defaults, in at most so many GB, at a held-out loss that differs by at
most this share of what training took off it."""
THINGS = ["apple", "mug", "knife", "plate", "book", "pan", "towel", "lamp", "bowl", "pencil"]
PLACES = ["drawer", "cabinet", "shelf", "desk", "fridge", "sinkbasin", "countertop", "garbagecan", "bed", "safe"]


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: str
    model: Path
    chats: tuple[SftExample, ...]
    lora: LoraParams
    out: Path


@dataclass(frozen=True)
class Run:
    """What a training took."""

    tokens: int
    seconds: float
    memory: float
    """Peak resident memory of its process, GB."""

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def train(job: Job) -> Run:
    """Train in this process, which does nothing else, and leave the adapter in `job.out`."""
    prepare()
    with timed_training() as seconds:
        (ours if job.arm == "ours" else theirs)(job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    tokens = sum(len(row.ids) for row in corpus(job.model, job.chats, job.lora))
    return Run(tokens * job.lora.epochs, sum(seconds), peak)


def prepare() -> None:
    """The process settings of the stages, before torch is imported."""
    quiet_libraries()
    cpu_env.apply()


@contextmanager
def timed_training() -> Iterator[list[float]]:
    """Seconds in `Trainer.train`, which both trainers inherit."""
    from transformers import Trainer

    seconds: list[float] = []
    inherited = Trainer.train

    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return inherited(*args, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    with mock.patch.object(Trainer, "train", timed):
        yield seconds


def ours(job: Job) -> None:
    """As the stages train."""
    from ragdistill.training.sft import train_lora

    train_lora(job.chats, job.model, job.out, job.lora, 0, training=load_params().training)


def theirs(job: Job) -> None:
    """As TRL's documentation trains, in the variant that the arm names."""
    low, kept = job.arm != "trl", job.arm == "trl-kept"
    train_with_trl(job.model, job.chats, job.lora, job.out, our_precision=low, keep_activations=kept)


def held_out_losses(model: Path, adapters: Sequence[Path | None], job: Job) -> list[float]:
    """Mean loss a learnt token of `job.chats`, in float32; an adapter of None is the model itself."""
    prepare()
    import torch

    from ragdistill.llm.weights import load_merged
    from ragdistill.training.encode import IGNORE

    found = []
    for adapter in adapters:
        merged: Any = load_merged(model, adapter, torch.float32)
        backbone, total, count = getattr(merged, merged.base_model_prefix), 0.0, 0
        for row in corpus(model, job.chats, job.lora):
            ids, targets = torch.tensor([row.ids]), torch.tensor(row.labels[1:])
            learnt = targets != IGNORE
            with torch.inference_mode():
                states = backbone(input_ids=ids, use_cache=False).last_hidden_state[0, :-1][learnt]
                logits = merged.get_output_embeddings()(states)
                total += float(torch.nn.functional.cross_entropy(logits, targets[learnt], reduction="sum"))
            count += int(learnt.sum())
        found.append(total / count)
    return found


def synthetic(rng: random.Random) -> SftExample:
    """One episode-like chat: 14 to 31 turns, of about 24 assistant and 30 user tokens each."""
    messages = [Message(role="system", content="You act in a house. Reply with a thought and an action.")]
    for _ in range(rng.choice([14, 19, 25, 25, 25, 31])):
        here, thing = f"{rng.choice(PLACES)} {rng.randint(1, 9)}", f"{rng.choice(THINGS)} {rng.randint(1, 3)}"
        there = f"{rng.choice(PLACES)} {rng.randint(1, 9)}"
        seen = f"You arrive at {here}. On the {here}, you see a {thing}, and a {rng.choice(THINGS)} 1. What now?"
        messages.append(Message(role="user", content=seen))
        messages.append(Message(role="assistant", content=f"I look for hot {thing}. It is not here.\n> go to {there}"))
    name = str(rng.random())
    return SftExample(id=name, messages=tuple(messages), task_id="", trajectory_id="", source="bench", bucket="")


def choose(args: argparse.Namespace) -> tuple[SftExample, ...]:
    """Chats to train on, then those held out: drawn from the file, or made up."""
    rng, count = random.Random(0), args.chats + args.held_out
    if args.synthetic:
        return tuple(synthetic(rng) for _ in range(count))
    if not args.data.is_file():
        raise SystemExit(f"sft_speed: {args.data} is not there; run the pipeline (make run), or give --synthetic.")
    found = read_jsonl(args.data, SftExample)
    if len(found) < count:
        raise SystemExit(f"sft_speed: {args.data} holds {len(found)} chats; --chats and --held-out take {count}.")
    return tuple(rng.sample(found, count))


def report(runs: dict[str, list[Run]], losses: dict[str, float], before: float) -> None:
    """Print the table, and whether the bar is reached."""
    print("| trainer | tokens/s | each round | × TRL's defaults | held-out loss | peak memory, GB |")
    print("|---|---:|---:|---:|---:|---:|")
    pooled = {arm: sum(r.tokens for r in rs) / sum(r.seconds for r in rs) for arm, rs in runs.items()}
    peak = {arm: max(r.memory for r in rs) for arm, rs in runs.items()}
    for arm, rs in runs.items():
        times = f"{pooled[arm] / pooled['trl']:.2f}" if "trl" in runs else "–"
        each = ", ".join(f"{r.speed:.0f}" for r in rs)
        print(f"| {ARMS[arm]} | {pooled[arm]:.0f} | {each} | {times} | {losses[arm]:.4f} | {peak[arm]:.2f} |")
    print(f"\nHeld-out loss before training: {before:.4f}.")
    if {"ours", "trl"} - set(runs):
        return
    ratio, apart, room = pooled["ours"] / pooled["trl"], abs(losses["ours"] - losses["trl"]), before - losses["trl"]
    met = ratio >= BAR and apart <= TOLERANCE * abs(room) and peak["ours"] <= MEMORY
    print(
        f"Bar: at least {BAR} × the tokens/s of TRL's defaults at an equal loss (they may differ by "
        f"{TOLERANCE * abs(room):.4f}, which is {TOLERANCE:.0%} of what training took off) in at most {MEMORY:.0f} GB. "
        f"Found: {ratio:.2f} ×, losses {apart:.4f} apart, {peak['ours']:.2f} GB: {'reached' if met else 'missed'}."
    )


def parse() -> argparse.Namespace:
    """The command line; what is not given follows from --stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["coldstart", "sft"], default="coldstart", help="whose chats and settings")
    parser.add_argument("--model", type=Path, help="a model directory")
    parser.add_argument("--data", type=Path, help="a jsonl of chats")
    parser.add_argument("--synthetic", action="store_true", help="made-up chats instead of --data")
    parser.add_argument("--chats", type=int, default=14, help="to train on, once an epoch")
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1, help="the steps of one epoch tell the speed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arms", default="ours,trl,trl-same", help=f"of {', '.join(ARMS)}")
    args = parser.parse_args()
    if set(args.arms.split(",")) - set(ARMS):
        parser.error(f"--arms are some of {', '.join(ARMS)}")
    model, data = (RAW, DEMOS) if args.stage == "coldstart" else (BASE, SFT / "distilled.jsonl")
    args.model, args.data = args.model or model, args.data or data
    return args


def main() -> None:
    """Train all arms in turn, then compare."""
    args, params = parse(), load_params()
    arms, chats = args.arms.split(","), choose(args)
    lora = params.coldstart.lora if args.stage == "coldstart" else params.sft.lora
    lora = msgspec.structs.replace(lora, epochs=args.epochs)
    machine = f"{len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f} before the start"
    how = f"{args.chats} chats in batches of {lora.batch}, epochs: {lora.epochs}, LoRA r {lora.r}, lr {lora.lr}"
    print(f"{machine}; {args.model}, {how}\n", flush=True)
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    with (
        tempfile.TemporaryDirectory(prefix="sft_speed.") as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as alone,
    ):
        for turn in range(args.rounds):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                job = Job(arm, args.model, chats[: args.chats], lora, Path(folder) / arm)
                runs[arm].append(alone.submit(train, job).result())
                print(f"round {turn + 1}, {arm}: {runs[arm][-1].seconds:.0f} s", file=sys.stderr, flush=True)
        rest = Job("", args.model, chats[args.chats :], lora, Path(folder))
        kept = [None, *(Path(folder) / arm for arm in arms)]
        before, *after = alone.submit(held_out_losses, args.model, kept, rest).result()
    tokens = next(iter(runs.values()))[0].tokens
    print(f"{tokens:,} tokens a training\n")
    report(runs, dict(zip(arms, after, strict=True)), before)


if __name__ == "__main__":
    main()
