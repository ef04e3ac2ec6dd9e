"""Pick the hints for one episode, once, at its start. Knows bank, bucket and goal sentence, never the gold type.

Which hints of the bucket are best is a `Ranker`'s business (`rankers`); `evidence` is the default.
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from ragdistill.hints.bank import Bank, hints_of, rank
from ragdistill.hints.templates import ROLES, placeholders
from ragdistill.records import Hint, Usage, digest, seed_of

How = Literal["retrieved", "random", "constant"]

Picked = Sequence[Hint] | Awaitable[tuple[Sequence[Hint], Usage]]
"""Hints, best first; where a model picks, to be awaited, with what the call cost, which the episode pays."""
Pick = Callable[[str, Sequence[Hint], int], Picked]
"""(goal, the bucket's hints in the order of `evidence`, k) → at most k of them."""


@dataclass(frozen=True)
class Ranker:
    """A way to pick among the hints of a bucket."""

    pick: Pick
    key: str = ""
    """Identity of all that decides a pick besides goal, bank and k; empty for `evidence` only."""


def retrieve(
    bank: Bank, bucket: str, goal: str, k: int, how: How = "retrieved", seed: int = 0, exclude: Collection[str] = ()
) -> list[Hint]:
    """At most `k` hints; fewer when fewer exist, never padded. `exclude` holds hint ids to pass over.

    - retrieved: the best of `bucket`; a hint that names an entity of the goal (`{floorlamp}`) goes before equal lift.
    - random: a control; hints of *other* buckets, drawn by `seed`, bucket and goal.
    - constant: a control; the k best of the whole bank, the same for every task.
    """
    pool = [h for h in hints_of(bank) if h.id not in exclude]
    if how == "constant":
        return _distinct(sorted(pool, key=rank))[:k]
    own = [h for h in pool if h.bucket == bucket]
    if how == "random":
        texts = {h.text for h in own}
        others = _distinct([h for h in pool if h.bucket != bucket and h.text not in texts])
        return random.Random(seed_of("random hints", seed, bucket, goal)).sample(others, min(k, len(others)))
    return by_evidence(goal, own, k)


def by_evidence(goal: str, hints: Collection[Hint], k: int) -> list[Hint]:
    """The best k by lift, then those that name an entity of the goal, then by score and mentions."""
    words = set(re.findall(r"[a-z_-]+", goal.lower()))
    return sorted(hints, key=lambda h: (-(h.lift or 0.0), not _named(h, words), *rank(h)))[:k]


EVIDENCE = Ranker(by_evidence)


def retriever(bank: Bank, k: int, how: How, ranker: Ranker = EVIDENCE) -> Callable[[str, str, int], Picked]:
    """(bucket, goal, seed) → hints of `bank`; `ranker` matters for `retrieved` only."""
    if how != "retrieved":
        return lambda bucket, goal, seed: retrieve(bank, bucket, goal, k, how, seed)

    def ranked(bucket: str, goal: str, seed: int) -> Picked:
        own = retrieve(bank, bucket, goal, len(hints_of(bank)))
        return ranker.pick(goal, own, k)

    return ranked


def bank_key(bank: Bank, k: int, how: How, ranker: Ranker = EVIDENCE) -> str:
    """Identity of all that decides which hints an episode sees."""
    hints = [(h.bucket, h.id, h.text, h.lift, h.score, h.mentions) for h in hints_of(bank)]
    own = [ranker.key] if how == "retrieved" and ranker.key else []
    return digest("retrieval", how, k, hints, *own)


def _named(hint: Hint, words: set[str]) -> bool:
    return any(p[1:-1] in words for p in placeholders(hint.text) if p not in ROLES)


def _distinct(hints: Collection[Hint]) -> list[Hint]:
    """First of each text: the same sentence may stand in several buckets."""
    return list({h.text: h for h in reversed(list(hints))}.values())[::-1]
