"""Draw the next token. The draw for token t of a call depends on (seed, t) and its logits only, never on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ragdistill.llm import Sampling

_HEAD = 256
"""Tokens tried before the whole vocabulary is sorted, which would cost more than the model."""


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from a counter-based generator."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())


def next_tokens(logits: torch.Tensor, draws: Sequence[tuple[Sampling, int]]) -> list[int]:
    """Next token of each row; `draws` gives each row's sampling and the index of the token in its reply."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (sampling, index) in enumerate(draws):
        if sampling.temperature > 0.0:
            tokens[row] = _draw(logits[row], sampling, index)
    return tokens


def _draw(logits: torch.Tensor, sampling: Sampling, index: int) -> int:
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    order = None
    if sampling.top_p < 1.0:
        probabilities, order = _nucleus(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    point = uniform(sampling.seed, index) * cumulative[-1]
    chosen = int(torch.searchsorted(cumulative, point, right=True).clamp_(max=len(cumulative) - 1))
    return chosen if order is None else int(order[chosen])


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens up to mass `top_p`, descending, and their ids; the first one always stays."""
    top, order = probabilities.topk(min(_HEAD, len(probabilities)))
    if float(top.sum()) < top_p:
        top, order = probabilities.sort(descending=True, stable=True)
    before = top.cumsum(-1) - top
    return top.masked_fill(before >= top_p, 0.0), order
