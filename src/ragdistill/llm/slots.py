"""Which conversation owns which slot of the engine, and which of its tokens are already in the KV cache.

Pure bookkeeping: this module knows no tensors. A slot remembers the exact ids whose keys and values it holds; the
next prompt of the conversation reuses the longest common prefix of those, and everything after it is computed anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Slot:
    """Room for one conversation."""

    index: int
    owner: str = ""
    """Conversation; empty = free."""
    tokens: list[int] = field(default_factory=list)
    """Ids whose keys and values are in the cache, in order."""
    busy: bool = False
    """A call is running on it; it may not be evicted."""
    used: int = 0
    """Tick of the last use, for eviction of the longest idle."""


def common_prefix(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # the usual case: the prompt extends what is cached
        return n
    return next(i for i in range(n) if a[i] != b[i])


class SlotTable:
    """Slots of one engine; used by its thread only."""

    def __init__(self, size: int) -> None:
        self.slots = [Slot(i) for i in range(size)]
        self._tick = 0

    def acquire(self, conversation: str, prompt: list[int]) -> Slot | None:
        """A slot for `prompt`, marked busy, its `tokens` cut to the reusable prefix; None when all are busy.

        The conversation's own slot comes first, then a free one, then the longest idle one (whose conversation
        is computed anew when it comes back). At least the last prompt token is left to compute.
        """
        slot = self._find(conversation)
        if slot is not None and slot.busy:
            return None
        slot = slot or self._free()
        if slot is None:
            return None
        if slot.owner != conversation or not conversation:
            slot.owner, slot.tokens = conversation, []
        reused = min(common_prefix(slot.tokens, prompt), len(prompt) - 1)
        del slot.tokens[reused:]
        slot.busy = True
        self._touch(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """The call on `slot` ended; what it computed stays, unless it belongs to no conversation."""
        slot.busy = False
        self._touch(slot)
        if not slot.owner:
            slot.tokens = []

    def forget(self, conversation: str) -> Slot | None:
        """Free the conversation's slot and return it; a running call finishes first and then keeps nothing."""
        slot = self._find(conversation)
        if slot is None:
            return None
        slot.owner = ""
        if not slot.busy:
            slot.tokens = []
        return slot

    def clear(self) -> None:
        """Free everything (after a failed step the cache's content is unknown)."""
        self.slots = [Slot(slot.index) for slot in self.slots]

    def _find(self, conversation: str) -> Slot | None:
        return next((s for s in self.slots if s.owner == conversation), None) if conversation else None

    def _free(self) -> Slot | None:
        idle = [s for s in self.slots if not s.busy]
        return min(idle, key=lambda s: (bool(s.owner), s.used if s.owner else s.index), default=None)

    def _touch(self, slot: Slot) -> None:
        self._tick += 1
        slot.used = self._tick
