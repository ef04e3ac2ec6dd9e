"""Chats → token ids and labels → optimiser batches cut into micro-batches of few shapes.

Nothing is truncated: an example that is too long is dropped whole and counted. A recipe may ask for what
arXiv 2510.01375 did instead: loss on all tokens, bare text without the chat template, a cut. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ragdistill.errors import DataError, EmptyResultError
from ragdistill.llm.chat_format import ChatFormat
from ragdistill.params import RecipeParams
from ragdistill.records import SftExample, digest

if TYPE_CHECKING:
    from datasets import Dataset

IGNORE = -100
"""Label of a token that is read but not learnt (PyTorch's and TRL's convention)."""
MAX_DROPPED = 0.2
"""More too-long examples than this share is an error: the rest would be a biased sample of short episodes."""
BUCKET = 64
"""Micro-batches are padded to multiples of this: few tensor shapes keep the allocator's memory bounded."""


OURS = RecipeParams(loss="assistant", format="chat", too_long="drop", label_smoothing=0.0, quantize="none")
"""The recipe that cold starts are trained with, and students unless told otherwise."""


class Encoded(NamedTuple):
    """One chat as the trainer sees it; `labels[i]` is `ids[i]` where the model has to produce it, else `IGNORE`."""

    ids: list[int]
    labels: list[int]


class Corpus(NamedTuple):
    """What is trained on, and what was left out."""

    rows: list[Encoded]
    too_long: int
    """Examples over the limit: left out whole, or cut."""
    mute: int = 0
    """Those of the cut ones that were left out because nothing to learn was left of them."""

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORE for row in self.rows for label in row.labels[1:])

    def hash(self) -> str:
        """Identity of the data as trained: ids and labels, in order."""
        return digest("sft-corpus", [(row.ids, row.labels) for row in self.rows])

    def dataset(self) -> Dataset:
        """As a pre-tokenised `datasets.Dataset`, so that TRL applies no chat template of its own."""
        from datasets import Dataset

        return Dataset.from_dict({"input_ids": [r.ids for r in self.rows], "labels": [r.labels for r in self.rows]})


def encode(examples: Sequence[SftExample], chat: ChatFormat, max_tokens: int, recipe: RecipeParams = OURS) -> Corpus:
    """Tokenise `examples`; those longer than `max_tokens` are dropped whole (or cut, by `recipe`) and counted.

    A cut that leaves nothing to learn drops the example too. Raises `EmptyResultError` without examples, and
    `DataError` when an example has nothing to learn from or more than `MAX_DROPPED` of them are dropped.
    """
    if not examples:
        raise EmptyResultError("There is no training example; loosen `strip` or give `teach` more tasks and attempts.")
    rows = [_encode_one(example, chat, recipe) for example in examples]
    too_long, longest = sum(len(row.ids) > max_tokens for row in rows), max(len(row.ids) for row in rows)
    if recipe.too_long == "cut":
        kept = [row for row in (_cut(row, max_tokens) for row in rows) if not _is_mute(row)]
        mute = len(rows) - len(kept)
        if mute > MAX_DROPPED * len(rows):
            raise DataError(
                f"{mute} of {len(rows)} training examples hold nothing to learn in their first {max_tokens} tokens "
                f"(the longest has {longest}); raise `lora.max_tokens`."
            )
        return Corpus(kept, too_long, mute)
    if too_long > MAX_DROPPED * len(rows):
        raise DataError(
            f"{too_long} of {len(rows)} training examples exceed {max_tokens} tokens (the longest has {longest}); "
            "raise `lora.max_tokens`; examples are not truncated (`sft.recipe.too_long`)."
        )
    return Corpus([row for row in rows if len(row.ids) <= max_tokens], too_long)


def _encode_one(example: SftExample, chat: ChatFormat, recipe: RecipeParams) -> Encoded:
    ids, mask = chat.training_ids(example.messages) if recipe.format == "chat" else _plain_ids(example, chat)
    labels = [token if own or recipe.loss == "all" else IGNORE for token, own in zip(ids, mask, strict=True)]
    row = Encoded(ids, labels)
    if _is_mute(row):
        raise DataError(f"Training example {example.id} holds no assistant tokens; remove it.")
    return row


def _is_mute(row: Encoded) -> bool:
    """Whether nothing is learnt from it; a first token is read only."""
    return all(label == IGNORE for label in row.labels[1:])


def _plain_ids(example: SftExample, chat: ChatFormat) -> tuple[list[int], list[bool]]:
    """One content a line as bare text, a stop token at the end; the mask is True on replies and the stop token."""
    ids: list[int] = []
    mask: list[bool] = []
    for message in example.messages:
        line = chat.text_ids(f"{message.content}\n")
        ids += line
        mask += [message.role == "assistant"] * len(line)
    return [*ids, max(chat.stop_ids)], [*mask, True]


def _cut(row: Encoded, max_tokens: int) -> Encoded:
    return Encoded(row.ids[:max_tokens], row.labels[:max_tokens])


Batch = dict[str, Any]
"""One optimiser batch, or one process's share of it. `micro`: list of what goes through the model at once, tensors by
name (ids and labels, and positions where rows are packed); `tokens`: read tokens of the whole batch, without padding;
`trained`: learnt tokens of the whole batch."""


def totals(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, int]:
    """`tokens` and `trained` of a batch; an example's first token is read only."""
    learnt = (label != IGNORE for row in rows for label in row["labels"][1:])
    return {"tokens": sum(len(row["input_ids"]) for row in rows), "trained": sum(learnt)}


class Collator:
    """Collate one optimiser batch into micro-batches of similar lengths, right-padded, at most `budget` tokens each.

    Padding stands right of everything and attention is causal, so no real token ever attends to padding and no
    attention mask is needed. An example longer than `budget` gets a micro-batch of its own.
    """

    def __init__(self, budget: int, pad_id: int) -> None:
        self._budget = budget
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> Batch:
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        micro: list[list[Mapping[str, list[int]]]] = []
        for row in ordered:  # ascending, so the newest row is the longest of its micro-batch
            width = padded(len(row["input_ids"]))
            if micro and (len(micro[-1]) + 1) * width <= self._budget:
                micro[-1].append(row)
            else:
                micro.append([row])
        return {"micro": [self._pad(group) for group in micro]} | totals(rows)

    def _pad(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = padded(max(len(row["input_ids"]) for row in rows))
        ids = torch.full((len(rows), width), self._pad_id)
        labels = torch.full((len(rows), width), IGNORE)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n] = torch.tensor(row["input_ids"])
            labels[i, :n] = torch.tensor(row["labels"])
        return {"input_ids": ids, "labels": labels}


def padded(n: int) -> int:
    """`n` rounded up to a full bucket."""
    return math.ceil(n / BUCKET) * BUCKET
