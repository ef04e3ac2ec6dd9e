"""A paged KV cache, and attention of a flat batch of tokens over it.

One step of the engine is a flat list of tokens of several conversations: conversations that decode bring one token
each, others a chunk of their prompt. Linear layers see one matrix; only attention looks at whose token is whose.
Decoding multiplies whole blocks of the pool in place, each with its owner's query: no copy, no padding to the longest
conversation. Query heads that share a key head are folded into the query length, so keys are read once.
This module knows no model class and no text.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ragdistill.errors import EnvironmentFault

CPU = torch.device("cpu")
BLOCK = 128
"""Tokens of one block; products of this size run at full speed and waste half a block per conversation."""
_ROWS = 16
"""Prompt chunks are rounded up to this, so that kernels are compiled for few shapes."""
_SPARSE = 0.5
"""Below this share of blocks in use by the step, copying those out is cheaper than computing all."""


@dataclass(slots=True)
class Blocks:
    """The blocks of one conversation, in order; block i holds positions i x BLOCK onwards."""

    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a conversation, the first at position `start`."""

    blocks: Blocks
    start: int
    count: int

    @property
    def length(self) -> int:
        """Context length after this chunk."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class _Decode:
    """Rows `0:rows` of the step decode over the blocks `selected` of the pool."""

    rows: int
    selected: slice | torch.Tensor
    owner: torch.Tensor
    """Row whose query each selected block gets; row 0 for blocks of nobody."""
    table: torch.Tensor
    """(rows, most blocks): which selected block; 0 where a row has fewer."""
    inverse: torch.Tensor
    """Where in the flattened table each selected block stands; 0 for blocks of nobody."""
    sum_up: torch.Tensor
    """(rows, selected), one where the block belongs to the row."""
    mask: torch.Tensor
    """(rows, 1, most blocks x BLOCK), 0 or -inf."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    first: int
    count: int
    rows: int
    """`count` rounded up: the rows after the chunk's own are computed too, for nothing."""
    blocks: torch.Tensor
    mask: torch.Tensor
    """(query heads per key head x rows, blocks x BLOCK), 0 or -inf: causal."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about one step that all layers share."""

    blocks: torch.Tensor
    offsets: torch.Tensor
    positions: torch.Tensor
    decode: _Decode | None
    prefills: tuple[_Prefill, ...]


class PagedCache:
    """Keys and values of all layers in blocks; memory is touched only as blocks come into use (on a CPU)."""

    def __init__(
        self,
        layers: int,
        blocks: int,
        kv_heads: int,
        query_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        """Room for `blocks` x BLOCK tokens, of all conversations together."""
        self._kv, self._group, self._dim = kv_heads, query_heads // kv_heads, head_dim
        self._dtype, self._device = dtype, device
        # block 0 takes the padding tokens; the lowest free block is used first, so that those in use lie together
        self._free = list(range(1, blocks + 1))
        self._total = blocks + 1
        keys, values = (blocks + 1, kv_heads, BLOCK, head_dim), (blocks + 1, kv_heads, head_dim, BLOCK)
        self._keys = [_lazy_zeros(keys, dtype, device) for _ in range(layers)]
        self._values = [_lazy_zeros(values, dtype, device) for _ in range(layers)]

    def resize(self, blocks: Blocks, length: int) -> None:
        """Give a conversation the blocks for `length` tokens, taking or freeing as needed."""
        wanted = _round_up(length, BLOCK) // BLOCK
        while len(blocks.ids) > wanted:
            heapq.heappush(self._free, blocks.ids.pop())
        while len(blocks.ids) < wanted:
            if not self._free:
                raise EnvironmentFault("The KV cache has no free block; lower `model.concurrency` or the context.")
            blocks.ids.append(heapq.heappop(self._free))

    def plan(self, chunks: Sequence[Chunk], exact: bool = False) -> Plan:
        """Lay out a step: `chunks`, those with a single token first, then padding up to a few round sizes.

        With `exact`, shapes depend on the given chunks only and not on which blocks they happen to have.
        """
        positions = [p for c in chunks for p in range(c.start, c.length)]
        blocks = [c.blocks.ids[p // BLOCK] for c in chunks for p in range(c.start, c.length)]
        single = [c for c in chunks if c.count == 1]
        prefills, first = [], len(single)
        for chunk in chunks[len(single) :]:
            prefills.append(self._plan_prefill(chunk, first))
            first += chunk.count
        fill = [0] * (_flat_size(first, chunks[-1]) - first)
        flat = torch.tensor(positions + fill, device=self._device)
        return Plan(
            blocks=torch.tensor(blocks + fill, device=self._device),
            offsets=flat % BLOCK,
            positions=flat,
            decode=self._plan_decode(single, exact) if single else None,
            prefills=tuple(prefills),
        )

    def _plan_decode(self, chunks: Sequence[Chunk], exact: bool) -> _Decode:
        own = [c.blocks.ids[: _round_up(c.length, BLOCK) // BLOCK] for c in chunks]
        high = max(map(max, own)) + 1
        used = sum(map(len, own))
        sparse = exact or used < _SPARSE * high
        place = {b: i for i, b in enumerate(b for row in own for b in row)} if sparse else None
        count, most = used if sparse else high, max(map(len, own))
        owner, inverse = np.zeros(count, np.int64), np.zeros(count, np.int64)
        table = np.zeros((len(own), most), np.int64)
        sum_up = np.zeros((len(own), count), np.float32)
        for row, ids in enumerate(own):
            at = [place[b] for b in ids] if place else ids
            owner[at], inverse[at] = row, row * most + np.arange(len(ids))
            table[row, : len(ids)], sum_up[row, at] = at, 1.0
        here = self._device
        lengths = torch.tensor([c.length for c in chunks], device=here)
        return _Decode(
            rows=len(own),
            selected=torch.tensor(list(place), device=here) if place else slice(0, high),
            owner=torch.from_numpy(owner).to(here),
            table=torch.from_numpy(table).to(here),
            inverse=torch.from_numpy(inverse).to(here),
            sum_up=torch.from_numpy(sum_up).to(here, self._dtype),
            mask=_mask(torch.arange(most * BLOCK, device=here) < lengths[:, None], self._dtype)[:, None],
        )

    def _plan_prefill(self, chunk: Chunk, first: int) -> _Prefill:
        ids = chunk.blocks.ids[: _round_up(chunk.length, BLOCK) // BLOCK]
        here = self._device
        rows = torch.arange(chunk.start, chunk.start + _round_up(chunk.count, _ROWS), device=here)
        seen = torch.arange(len(ids) * BLOCK, device=here) <= rows[:, None]
        mask, blocks = _mask(seen, self._dtype).repeat(self._group, 1), torch.tensor(ids, device=here)
        return _Prefill(first=first, count=chunk.count, rows=len(rows), blocks=blocks, mask=mask)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float
    ) -> torch.Tensor:
        """Store the tokens' keys and values and attend. q (tokens, heads, dim), k and v (tokens, kv heads, dim)."""
        keys, values = self._keys[layer], self._values[layer]
        keys.transpose(1, 2).index_put_((plan.blocks, plan.offsets), k)
        values.permute(0, 3, 1, 2).index_put_((plan.blocks, plan.offsets), v)
        q = q * scale
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        if plan.decode is not None:
            out[: plan.decode.rows] = self._decode(plan.decode, q, keys, values)
        for part in plan.prefills:
            out[part.first : part.first + part.count] = self._prefill(part, q, keys, values)
        return out

    def _decode(self, d: _Decode, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        keys, values = keys[d.selected].flatten(0, 1), values[d.selected].flatten(0, 1)
        count, heads = len(d.owner), self._kv * self._group
        queries = q[: d.rows][d.owner].view(count * self._kv, self._group, self._dim)
        scores = torch.bmm(queries, keys.transpose(1, 2)).view(count, heads, BLOCK)
        rows = scores[d.table].transpose(1, 2).reshape(d.rows, heads, -1).add_(d.mask)
        rows = torch.softmax(rows, -1).view(d.rows, heads, -1, BLOCK).transpose(1, 2).reshape(-1, heads, BLOCK)
        weights = rows[d.inverse].view(count * self._kv, self._group, BLOCK)
        parts = torch.bmm(weights, values.transpose(1, 2)).view(count, -1)
        return (d.sum_up @ parts).view(d.rows, heads, self._dim)

    def _prefill(self, p: _Prefill, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        folded = q[p.first : p.first + p.rows].transpose(0, 1).reshape(self._kv, -1, self._dim)
        context = keys[p.blocks].transpose(0, 1).reshape(self._kv, -1, self._dim)
        scores = torch.bmm(folded, context.transpose(1, 2)).add_(p.mask)
        content = values[p.blocks].permute(1, 2, 0, 3).reshape(self._kv, self._dim, -1)
        out = torch.bmm(torch.softmax(scores, -1), content.transpose(1, 2))
        return out.view(-1, p.rows, self._dim)[:, : p.count].transpose(0, 1)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _flat_size(tokens: int, last: Chunk) -> int:
    """Tokens of a step rounded up to few sizes, with room for the extra rows of its last chunk."""
    if last.count > 1:
        tokens += _round_up(last.count, _ROWS) - last.count
    return _round_up(tokens, 8 if tokens <= 64 else 32 if tokens <= 256 else 128)


def _mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose pages the system provides on first use (numpy callocs, torch writes); on a GPU taken at once.

    Zeros and not whatever was there: masked positions are multiplied by 0, and 0 x NaN is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    bits = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, bits)).view(dtype)
