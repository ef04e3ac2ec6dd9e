"""Speed of the local engine on episode-like conversations; prints one table row per concurrency.

    python benchmarks/engine_speed.py MODEL_DIR [--conversations 16 32] [--turns 12] [--prefix 700]

Each conversation starts with a prefix of its own, then observes and generates in turns of fixed size. It knows no
task; the texts are random words, so it says nothing about quality.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path

from ragdistill.llm import Sampling
from ragdistill.llm.local import LocalEngine
from ragdistill.records import Message, Usage

WORDS = (
    "drawer", "cabinet", "shelf", "countertop", "garbagecan", "apple", "potato", "mug",
    "lamp", "take", "clean", "heat", "cool", "open", "look",
)  # fmt: skip

WORD = 1.18
"""Mean tokens per word of these, with SmolLM2's tokenizer."""


def text(rng: random.Random, words: int) -> str:
    """Random words; about 1.2 tokens each."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


async def episode(engine: LocalEngine, number: int, args: argparse.Namespace) -> Usage:
    """One conversation; returns its usage."""
    rng, total = random.Random(number), Usage()
    messages = [Message(role="system", content=text(rng, int(args.prefix / WORD)))]
    for turn in range(args.turns):
        messages.append(Message(role="user", content=text(rng, int(args.observed / WORD))))
        # a high temperature draws no early end, so every turn has the same length
        sampling = Sampling(temperature=args.temperature, seed=number * 100 + turn, max_tokens=args.generated)
        reply = await engine.chat(messages, sampling, f"c{number}")
        total += reply.usage
        messages.append(Message(role="assistant", content=reply.text))
    await engine.forget(f"c{number}")
    return total


async def measure(engine: LocalEngine, conversations: int, args: argparse.Namespace) -> None:
    """Run `conversations` episodes at once and print a table row."""
    start = time.perf_counter()
    usages = await asyncio.gather(*(episode(engine, i, args) for i in range(conversations)))
    seconds = time.perf_counter() - start
    generated = sum(u.completion_tokens for u in usages)
    computed = sum(u.computed_tokens for u in usages)
    row = [conversations, f"{seconds:.1f}", generated, f"{generated / seconds:.0f}", f"{computed / seconds:.0f}"]
    print("| " + " | ".join(map(str, row)) + " |", flush=True)


def main() -> None:
    """Parse the arguments, warm up, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--conversations", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--prefix", type=int, default=700)
    parser.add_argument("--observed", type=int, default=40)
    parser.add_argument("--generated", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--reference", action="store_true")
    args = parser.parse_args()
    engine = LocalEngine(args.model, dtype=args.dtype, reference=args.reference)
    print("| conversations | seconds | generated tokens | generated/s | computed/s |\n|---|---|---|---|---|")
    for conversations in args.conversations:
        asyncio.run(measure(engine, conversations, args))
    engine.close()


if __name__ == "__main__":
    main()
