"""One optimiser batch over several processes, and examples that share rows: how a batch is cut at scale.

Every process reads the whole optimiser batch and computes its share of it, so batch size, order and the weight of each
token are those of one process, whatever the number of processes. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ragdistill.training.encode import BUCKET, IGNORE, Batch, padded, totals

Rows = Sequence[Mapping[str, list[int]]]
Cut = Callable[[Rows], Batch]
"""Collates rows into micro-batches."""


class Packer:
    """Collate one optimiser batch into rows of several examples each, at most `budget` tokens a row.

    Positions start anew with each example: attention implementations that know packing keep the examples apart by
    them. An example's first token is nobody's target, since what stands before it is another example. A longer example
    gets a row of its own.
    """

    def __init__(self, budget: int, pad_id: int) -> None:
        self._budget = budget
        self._pad_id = pad_id

    def __call__(self, rows: Rows) -> Batch:
        bins: list[list[Mapping[str, list[int]]]] = []
        free: list[int] = []
        for row in sorted(rows, key=lambda row: -len(row["input_ids"])):  # first fit, longest first
            n = len(row["input_ids"])
            at = next((i for i, left in enumerate(free) if left >= n), None)
            if at is None:
                bins.append([row])
                free.append(self._budget - n)
            else:
                bins[at].append(row)
                free[at] -= n
        return {"micro": [self._row(group) for group in bins]} | totals(rows)

    def _row(self, group: Rows) -> dict[str, torch.Tensor]:
        ids = [token for row in group for token in row["input_ids"]]
        labels = [label for row in group for label in (IGNORE, *row["labels"][1:])]
        positions = [i for row in group for i in range(len(row["input_ids"]))]
        rest = padded(len(ids)) - len(ids)  # counts as one more example, in which nothing is learnt
        return {
            "input_ids": torch.tensor([ids + [self._pad_id] * rest]),
            "labels": torch.tensor([labels + [IGNORE] * rest]),
            "position_ids": torch.tensor([positions + list(range(rest))]),
        }


class Share:
    """Collate this process's share of one optimiser batch; all processes get as many micro-batches.

    `cut` collates the share. Examples go to the process with the fewest tokens so far, longest first. Where one has
    fewer micro-batches it gets empty ones, since gathering sharded weights and gradients takes all processes.
    """

    def __init__(self, cut: Cut, rank: int, world: int) -> None:
        self._cut, self._rank, self._world = cut, rank, world

    def __call__(self, rows: Rows) -> Batch:
        cuts = [self._cut(share)["micro"] if share else [] for share in shares(rows, self._world)]
        mine, most = cuts[self._rank], max(len(cut) for cut in cuts)
        like = next(cut[0] for cut in cuts if cut)
        return {"micro": mine + [_empty(like)] * (most - len(mine))} | totals(rows)


def shares(rows: Rows, world: int) -> list[list[Any]]:
    """`rows` in `world` parts of about as many tokens; parts can be empty."""
    parts: list[list[Any]] = [[] for _ in range(world)]
    loads = [0] * world
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        at = loads.index(min(loads))
        parts[at].append(row)
        loads[at] += len(row["input_ids"])
    return parts


def _empty(like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The smallest micro-batch, in which nothing is learnt."""
    row = {"input_ids": torch.zeros((1, BUCKET), dtype=torch.long), "labels": torch.full((1, BUCKET), IGNORE)}
    return row | ({"position_ids": torch.arange(BUCKET).unsqueeze(0)} if "position_ids" in like else {})
