"""Speed of LoRA training on chats as long as real episodes: `python benchmarks/sft_speed.py MODEL_DIR [CHATS]`.

Synthetic chats of about 25 turns, 24 assistant and 30 user tokens a turn. Prints tokens per second and peak memory.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
from pathlib import Path

from ragdistill.params import LoraParams
from ragdistill.records import Message, SftExample
from ragdistill.training.sft import train_lora

THINGS = ["apple", "mug", "knife", "plate", "book", "pan", "towel", "lamp", "bowl", "pencil"]
PLACES = ["drawer", "cabinet", "shelf", "desk", "fridge", "sinkbasin", "countertop", "garbagecan", "bed", "safe"]


def chat(rng: random.Random, turns: int) -> SftExample:
    """One episode-like chat."""
    messages = [Message(role="system", content="You act in a house. Reply with a thought and an action.")]
    for _ in range(turns):
        here, thing = f"{rng.choice(PLACES)} {rng.randint(1, 9)}", f"{rng.choice(THINGS)} {rng.randint(1, 3)}"
        there = f"{rng.choice(PLACES)} {rng.randint(1, 9)}"
        seen = f"You arrive at {here}. On the {here}, you see a {thing}, and a {rng.choice(THINGS)} 1. What now?"
        messages.append(Message(role="user", content=seen))
        messages.append(Message(role="assistant", content=f"I look for hot {thing}. It is not here.\n> go to {there}"))
    name = str(rng.random())
    return SftExample(id=name, messages=tuple(messages), task_id="", trajectory_id="", source="bench", bucket="")


def main() -> None:
    """Train one epoch and report."""
    base, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    rng = random.Random(0)
    chats = [chat(rng, rng.choice([14, 19, 25, 25, 25, 31])) for _ in range(count)]
    lora = LoraParams(
        r=32, alpha=64, dropout=0.0, lr=1e-3, epochs=1, batch=4, warmup=0.1, weight_decay=0.0, max_tokens=2048
    )
    with tempfile.TemporaryDirectory() as tmp:
        result = train_lora(chats, base, Path(tmp) / "adapter", lora, 0, progress=print)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    share = result.trained_tokens / result.tokens
    print(f"{result.examples} chats, {result.tokens / result.examples:.0f} tokens each, {share:.0%} trained")
    print(f"{result.tokens_per_second:.0f} tokens/s, loss {result.final_loss:.3f}, peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
