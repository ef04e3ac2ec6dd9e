"""A KV cache of preallocated slots, and attention of a flat batch of tokens over it.

One step of the engine is a flat list of tokens of several conversations: conversations that decode bring one token
each, others a chunk of their prompt. Linear layers see one matrix; only attention looks at whose token is whose.
Query heads that share a key head are folded into the query length, so keys are read once and never repeated. Keys
are stored transposed, because a batched product with a strided transposed operand is copied first (4x slower).
This module knows no model class and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LENGTH_BUCKET = 64
"""Context lengths are rounded up to this, so that kernels are compiled for few shapes."""
GROWTH = 512
"""Tokens by which all slots grow at once."""
_ROW_PADDING = 32
"""Keeps the row stride off powers of two, where rows fall into the same cache sets."""
_GROUP_COST = 256
"""What one more decode group costs, in tokens of context read (call overhead; measured)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of the conversation in `slot`, the first at position `start`."""

    slot: int
    start: int
    count: int

    @property
    def length(self) -> int:
        """Context length after this chunk."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class _Group:
    """Decoding rows `first:last` of the step, attending over neighbouring slots `low:high` in one product."""

    first: int
    last: int
    low: int
    high: int
    length: int
    spread: torch.Tensor | None
    """Row (of this group) to compute for each slot; None when every slot has its row."""
    gather: torch.Tensor | None
    """Slot (of this group) of each row."""
    mask: torch.Tensor
    """(slots x key heads, 1, length), 0 or -inf."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    first: int
    last: int
    slot: int
    length: int
    mask: torch.Tensor
    """(query heads per key head x tokens, length), 0 or -inf: causal."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about one step that all layers share."""

    slots: torch.Tensor
    positions: torch.Tensor
    groups: tuple[_Group, ...]
    prefills: tuple[_Prefill, ...]


def split_groups(slots: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut decoding rows (ascending slots) into runs so that the context read in vain is least.

    A run reads (slots spanned) x (longest length); dynamic programming over the cut points.
    """
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(slots) + 1):
        longest, options = 0, []
        for begin in range(end - 1, -1, -1):
            longest = max(longest, lengths[begin])
            cost = (slots[end - 1] - slots[begin] + 1) * longest + _GROUP_COST
            options.append((best[begin][0] + cost, begin))
        best.append(min(options))
    runs, end = [], len(slots)
    while end:
        runs.append((best[end][1], end))
        end = best[end][1]
    return runs[::-1]


class SlotCache:
    """Keys and values of all layers for a fixed number of slots; it grows in length only."""

    def __init__(self, layers: int, slots: int, kv_heads: int, query_heads: int, head_dim: int, dtype: torch.dtype):
        self._slots, self._kv, self._group, self._dim = slots, kv_heads, query_heads // kv_heads, head_dim
        self._dtype = dtype
        self._capacity = 0
        empty = torch.empty(0)
        self._keys, self._values = [empty] * layers, [empty] * layers

    def reserve(self, length: int) -> None:
        """Make room for contexts of `length` tokens."""
        if length <= self._capacity:
            return
        old, self._capacity = self._capacity, -(-length // GROWTH) * GROWTH
        slots = self._slots + 1  # the last one takes the padding tokens
        for layer in range(len(self._keys)):
            # zeros, not empty: masked positions are multiplied by 0, and 0 x NaN is NaN
            keys = torch.zeros(slots, self._kv, self._dim, self._capacity + _ROW_PADDING, dtype=self._dtype)
            values = torch.zeros(slots, self._kv, self._capacity + _ROW_PADDING, self._dim, dtype=self._dtype)
            if old:
                keys[..., :old], values[:, :, :old] = self._keys[layer][..., :old], self._values[layer][:, :, :old]
            self._keys[layer], self._values[layer] = keys, values

    def plan(self, chunks: Sequence[Chunk], padded: int) -> Plan:
        """Lay out a step: `chunks` with single tokens first, ascending by slot; `padded` flat tokens in all."""
        slots = [c.slot for c in chunks for _ in range(c.count)]
        positions = [p for c in chunks for p in range(c.start, c.length)]
        fill = padded - len(slots)
        self.reserve(_bucket(max(c.length for c in chunks)))
        single = [c for c in chunks if c.count == 1]
        runs = split_groups([c.slot for c in single], [_bucket(c.length) for c in single])
        prefills, first = [], len(single)
        for chunk in chunks[len(single) :]:
            prefills.append(self._prefill(chunk, first))
            first += chunk.count
        return Plan(
            slots=torch.tensor(slots + [self._slots] * fill),
            positions=torch.tensor(positions + [0] * fill),
            groups=tuple(self._decode_group(single[a:b], a) for a, b in runs),
            prefills=tuple(prefills),
        )

    def _decode_group(self, chunks: Sequence[Chunk], first: int) -> _Group:
        low, high = chunks[0].slot, chunks[-1].slot + 1
        length = _bucket(max(c.length for c in chunks))
        rows = torch.zeros(high - low, dtype=torch.long)
        gather = torch.tensor([c.slot - low for c in chunks])
        rows[gather] = torch.arange(len(chunks))
        lengths = torch.tensor([c.length for c in chunks])[rows]
        mask = _mask(torch.arange(length) < lengths[:, None], self._dtype)
        dense = high - low == len(chunks)
        return _Group(
            first=first, last=first + len(chunks), low=low, high=high, length=length,
            spread=None if dense else rows, gather=None if dense else gather,
            mask=mask.repeat_interleave(self._kv, 0)[:, None],
        )  # fmt: skip

    def _prefill(self, chunk: Chunk, first: int) -> _Prefill:
        length = _bucket(chunk.length)
        seen = torch.arange(length) <= torch.arange(chunk.start, chunk.length)[:, None]
        mask = _mask(seen, self._dtype).repeat(self._group, 1)
        return _Prefill(first=first, last=first + chunk.count, slot=chunk.slot, length=length, mask=mask)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float
    ) -> torch.Tensor:
        """Store the tokens' keys and values and attend. q (tokens, heads, dim), k and v (tokens, kv heads, dim)."""
        keys, values = self._keys[layer], self._values[layer]
        keys.permute(0, 3, 1, 2).index_put_((plan.slots, plan.positions), k)
        values.transpose(1, 2).index_put_((plan.slots, plan.positions), v)
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for group in plan.groups:
            out[group.first : group.last] = self._attend_group(group, q, keys, values, scale)
        for part in plan.prefills:
            out[part.first : part.last] = self._attend_prefill(part, q, keys, values, scale)
        return out

    def _attend_group(
        self, g: _Group, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        rows = q[g.first : g.last]
        if g.spread is not None:
            rows = rows[g.spread]
        folded = rows.reshape(-1, self._group, self._dim)
        scores = torch.baddbmm(g.mask, folded, keys[g.low : g.high].flatten(0, 1)[:, :, : g.length], alpha=scale)
        out = torch.bmm(torch.softmax(scores, -1), values[g.low : g.high].flatten(0, 1)[:, : g.length])
        out = out.view(g.high - g.low, -1, self._dim)
        return out if g.gather is None else out[g.gather]

    def _attend_prefill(
        self, p: _Prefill, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        tokens = p.last - p.first
        folded = q[p.first : p.last].transpose(0, 1).reshape(self._kv, -1, self._dim)
        scores = torch.baddbmm(p.mask, folded, keys[p.slot, :, :, : p.length], alpha=scale)
        out = torch.bmm(torch.softmax(scores, -1), values[p.slot, :, : p.length])
        return out.view(-1, tokens, self._dim).transpose(0, 1)


def _bucket(length: int) -> int:
    return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


def _mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
