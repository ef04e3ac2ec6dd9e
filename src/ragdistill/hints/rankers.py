"""Rankers: which hints of the bucket are shown for this goal. All behind `retrieve.Ranker`, chosen by `hints.ranker`.

`retrieve.EVIDENCE` is the default. Here: likeness of words (`tfidf`) or of meaning (`embedding`) to the goal, a
language model's choice (`llm`), and success measured with and without each hint (`lift`). Ties keep the order of
`evidence`; none pads. Knows no engine: a model comes as a `ChatModel`, an embedder as a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from ragdistill.errors import DataError
from ragdistill.hints.ask import CALL_VERSION, Asker, read_object
from ragdistill.hints.bank import Bank, hints_of
from ragdistill.hints.lift import LiftRow
from ragdistill.hints.prompts import render
from ragdistill.hints.retrieve import Ranker
from ragdistill.hints.transcript import clip
from ragdistill.llm import Sampling
from ragdistill.records import Hint, Message, Usage, digest

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts → one unit vector each."""

CHOICE_SCHEMA = json.dumps({
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"type": "integer"}}},
    "required": ["numbers"],
    "additionalProperties": False,
})  # fmt: skip
_CHOICE_TOKENS = 64
_GOAL = 1000
"""Characters of a goal that a model is asked about."""
_PRIOR_TASKS = 4.0
"""A measured difference is shrunk as if so many more tasks had shown none: few tasks prove little."""


class Choice(msgspec.Struct, forbid_unknown_fields=True):
    """A model's reply to the question which hints to show."""

    numbers: list[int]


def tfidf_ranker(bank: Bank) -> Ranker:
    """Cosine of character 3- to 5-grams, weighted by TF-IDF over the texts of the whole bank.

    Grams within words let "cleaned" meet "clean" and "{desklamp}" a goal's "lamp".
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    vectors.fit(sorted({h.text for h in hints_of(bank)}) or ["empty"])

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        return vectors.transform(texts).toarray().astype(np.float32)

    return _by_likeness(embed, "tfidf-1")


def embedding_ranker(embed: Embed, fingerprint: str) -> Ranker:
    """Cosine of sentence embeddings; `fingerprint` is the identity of what computes them."""
    return _by_likeness(embed, digest("embedding-1", fingerprint))


def _by_likeness(embed: Embed, key: str) -> Ranker:
    @lru_cache(maxsize=10_000)
    def vector(text: str) -> NDArray[np.float32]:
        return embed([text])[0]

    def pick(goal: str, hints: Sequence[Hint], k: int) -> list[Hint]:
        # rounded, so that equal texts do not differ by the order of a sum
        likeness = [round(float(vector(h.text) @ vector(goal)), 6) for h in hints]
        return [hints[i] for i in sorted(range(len(hints)), key=lambda i: (-likeness[i], i))][:k]

    return Ranker(pick, key)


def lift_ranker(rows: Sequence[LiftRow]) -> Ranker:
    """By measured lift, shrunk by its number of tasks; unmeasured counts as none.

    A hint whose whole interval lies below zero is not shown at all.
    """
    measured = {row.hint_id: row for row in rows}

    def worth(hint: Hint) -> float:
        row = measured.get(hint.id)
        return 0.0 if row is None else row.diff * row.tasks / (row.tasks + _PRIOR_TASKS)

    def pick(goal: str, hints: Sequence[Hint], k: int) -> list[Hint]:
        harmful = {i for i, row in measured.items() if row.hi < 0}
        return sorted((h for h in hints if h.id not in harmful), key=lambda h: -worth(h))[:k]

    return Ranker(pick, digest("lift-1", sorted((r.hint_id, r.diff, r.hi, r.tasks) for r in rows)))


class LlmChoice:
    """A language model chooses among the bucket's hints by number; equal questions are asked once."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self.fallbacks = 0
        """Replies that named no hint; these episodes saw the order of `evidence`."""

    def ranker(self) -> Ranker:
        """Behind the common interface."""
        wording = (render("system"), render("choose", goal="", hints="", k=""))
        return Ranker(self.pick, digest("llm-2", CALL_VERSION, self.asker.model.fingerprint(), wording))

    async def pick(self, goal: str, hints: Sequence[Hint], k: int) -> tuple[list[Hint], Usage]:
        """At most k hints, and what the choice cost; no call is made where there is nothing to choose."""
        if len(hints) <= k or k == 0:
            return list(hints[:k]), Usage()
        listed = "\n".join(f"{i}. {h.text}" for i, h in enumerate(hints, 1))
        question = render("choose", goal=clip(goal, _GOAL), hints=listed, k=k)
        chat = [Message(role="system", content=render("system")), Message(role="user", content=question)]
        reply = await self.asker.ask(chat, Sampling(max_tokens=_CHOICE_TOKENS, schema=CHOICE_SCHEMA))
        try:
            numbers = read_object(reply.text, Choice).numbers
        except DataError:
            numbers = []
        chosen = [hints[n - 1] for n in dict.fromkeys(numbers) if 0 < n <= len(hints)]
        self.fallbacks += not chosen
        return (chosen or list(hints))[:k], reply.usage
