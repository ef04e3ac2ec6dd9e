"""What `sft_speed.py` compares with: TRL's `SFTTrainer` as its documentation has it, on this project's chats.

TRL renders and tokenises the chats itself; that it reads and learns exactly our tokens is checked. Knows no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ragdistill.params import LoraParams
from ragdistill.records import SftExample

TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
"""A turn in SmolLM2's template, and as TRL needs it to know the assistant's tokens:"""
MARKED = (
    "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}{% generation %}"
    "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}{% else %}" + TURN + "{% endif %}"
)


def train_with_trl(
    model: Path,
    chats: Sequence[SftExample],
    lora: LoraParams,
    out: Path,
    *,
    our_precision: bool,
    keep_activations: bool,
) -> None:
    """Train and leave the adapter in `out`: TRL's defaults but for the hyperparameters, which are `lora`'s.

    `our_precision`: the weights are not float32 but what this project's trainer has them in. `keep_activations`: they
    are not computed again in the backward pass.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from ragdistill.llm.chat_format import load_tokenizer
    from ragdistill.llm.weights import write_base_identity
    from ragdistill.training.hardware import precision_for

    cuda = torch.cuda.is_available()
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = marked(str(tokenizer.chat_template))
    kept: dict[str, Any] = {"gradient_checkpointing": False} if keep_activations else {}
    args = SFTConfig(
        output_dir=str(out), assistant_only_loss=True, max_length=lora.max_tokens, seed=0, data_seed=0,
        num_train_epochs=lora.epochs, per_device_train_batch_size=lora.batch, learning_rate=lora.lr,
        warmup_steps=math.ceil(lora.warmup * math.ceil(len(chats) / lora.batch) * lora.epochs),
        weight_decay=lora.weight_decay, report_to="none", save_strategy="no", use_cpu=not cuda,
        model_init_kwargs={"dtype": precision_for("cuda" if cuda else "cpu")} if our_precision else None, **kept,
    )  # fmt: skip
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    data = Dataset.from_list([{"messages": msgspec.to_builtins(chat.messages)} for chat in chats])
    trainer = SFTTrainer(str(model), args, train_dataset=data, processing_class=tokenizer, peft_config=config)
    check_equal(corpus(model, chats, lora), trainer.train_dataset)
    trainer.train()
    trained: Any = trainer.model
    trained.save_pretrained(str(out))
    write_base_identity(out, model)


def marked(template: str) -> str:
    """The chat template with the assistant's tokens marked for TRL; one that TRL knows stays, as TRL marks it."""
    return template if "generation %}" in template else template.replace(TURN, MARKED)


def check_equal(rows: Sequence[Any], prepared: Any) -> None:
    """Stop when TRL would not read and learn exactly the tokens that we do."""
    if [r.ids for r in rows] != list(prepared["input_ids"]) or [r.labels for r in rows] != list(prepared["labels"]):
        raise SystemExit("sft_speed: TRL's token ids or labels are not ours for this model; nothing can be compared.")


def corpus(model: Path, chats: Sequence[SftExample], lora: LoraParams) -> list[Any]:
    """Token ids and labels of each chat, as this project trains on them."""
    from ragdistill.llm.chat_format import ChatFormat, load_tokenizer
    from ragdistill.training.encode import encode

    return encode(chats, ChatFormat(load_tokenizer(model)), lora.max_tokens).rows
