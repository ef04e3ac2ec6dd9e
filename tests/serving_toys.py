"""A toy model that was taught to speak text, and adapters that make it say something else: for export and serving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragdistill.llm.chat_format import ChatFormat
from ragdistill.llm.weights import load_merged, write_base_identity
from ragdistill.records import Message, write_json
from tests.llm_toys import toy_model, toy_tokenizer

import torch  # isort: skip  (after the toys, which prepare the process)

CHATS = [
    [
        Message(role="user", content=f"You see a mug and drawer {i}. <|im_end|>"),
        Message(role="assistant", content="think: I look for a hot mug."),
        Message(role="user", content="You see a cabinet 2."),
        Message(role="assistant", content="open drawer 1"),
    ]
    for i in range(3)
]


def teach(model: Any, replies: Sequence[str], steps: int) -> None:
    """Overfit `model` on CHATS with other replies, so that it speaks text and not random bytes."""
    form = ChatFormat(toy_tokenizer())
    batch = []
    for chat in CHATS:
        said = iter(replies)
        told = [m if m.role == "user" else Message(role="assistant", content=next(said)) for m in chat]
        ids, mask = form.training_ids(told)
        batch.append((torch.tensor([ids]), torch.tensor([[i if own else -100 for i, own in zip(ids, mask)]])))  # noqa: B905
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        ids, labels = batch[step % len(batch)]
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def taught_model(directory: Path, head_dim: int = 8) -> Path:
    """`toy_model` after two seconds of learning to say what stands in CHATS."""
    toy_model(directory, head_dim=head_dim)
    model = load_merged(directory, None, torch.float32)
    teach(model, [m.content for m in CHATS[0] if m.role == "assistant"], 120)
    model.save_pretrained(directory)
    return directory


def make_adapter(base: Path, directory: Path, replies: Sequence[str] = ("open cabinet 2", "think: a mug.")) -> Path:
    """A LoRA student that was taught other replies."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model: Any = get_peft_model(load_merged(base, None, torch.float32), config)
    teach(model, replies, 90)
    model.save_pretrained(str(directory))
    write_base_identity(directory, base)
    write_json(directory / "training.json", {"examples": 3, "seed": 0})
    return directory
