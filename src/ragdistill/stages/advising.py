"""What the stages around hints share: the model that writes or chooses hints, its paid calls, and the retriever.

Nothing is opened that the parameters do not ask for: with the defaults no model but the one that plays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ragdistill.hints.ask import Asker
from ragdistill.hints.bank import Bank, load_bank
from ragdistill.hints.lift import LiftRow
from ragdistill.hints.rankers import LlmChoice, embedding_ranker, lift_ranker, tfidf_ranker
from ragdistill.hints.retrieve import EVIDENCE, How, Ranker, bank_key, retriever
from ragdistill.journal import Journal, cache_dir
from ragdistill.llm import ChatModel, Reply
from ragdistill.llm.weights import resolve_model
from ragdistill.params import Params
from ragdistill.records import read_jsonl
from ragdistill.rollout import Retrieve
from ragdistill.stages.common import BANK, LIFT
from ragdistill.stages.playing import at_once, open_endpoint, open_model, teacher_dir
from ragdistill.stages.spending import SERVED, tell


@dataclass(frozen=True)
class Retrieval:
    """What `playing.play` needs to know of hints."""

    retrieve: Retrieve | None = None
    key: str = ""
    choice: LlmChoice | None = None

    def words(self) -> str:
        """What the choice by a model cost, to be added to a stage's line; empty where none was made."""
        if self.choice is None:
            return ""
        a = self.choice.asker
        return (
            f"; hints chosen by {a.calls} calls ({a.replayed} from the journal, {self.choice.fallbacks} unusable, "
            f"{a.usage.billed:,} of the tokens)"
        )


def open_hint_model(params: Params, name: str | None) -> ChatModel:
    """The model that `name` (`hints.llm.model`, `hints.ranker_model`) means: the served one, the teacher's for None."""
    if name == SERVED:
        return open_endpoint(params)
    directory = teacher_dir() if name is None else resolve_model(name, cache_dir("models"))
    return open_model(params, directory, context=params.hints.llm.context_tokens)


def asker(params: Params, model: ChatModel) -> Asker:
    """`model` with the project's journal of calls."""
    return Asker(model, Journal(cache_dir("journal", "hint_calls"), Reply), at_once(params, model))


@contextmanager
def retrieval(params: Params, how: How | None, player: ChatModel) -> Iterator[Retrieval]:
    """The retriever that `hints.ranker` names; `how` None is a policy without hints.

    A model that only chooses hints is closed at the end; `player`, which plays, chooses where no other is named.
    """
    if how is None:
        yield Retrieval()
        return
    bank, k = load_bank(BANK, params.hints), params.hints.k
    own: ChatModel | None = None
    choice: LlmChoice | None = None
    if how == "retrieved" and params.hints.ranker == "llm":
        named = params.hints.ranker_model
        own = open_hint_model(params, named) if named else None
        choice = LlmChoice(asker(params, own or player))
    ranker = choice.ranker() if choice else _ranker(params, bank) if how == "retrieved" else EVIDENCE
    try:
        yield Retrieval(retriever(bank, k, how, ranker), bank_key(bank, k, how, ranker), choice)
    finally:
        if own is not None:
            own.close()
            tell(own)


def _ranker(params: Params, bank: Bank) -> Ranker:
    """The ranker of `hints.ranker` that asks no `ChatModel`."""
    if params.hints.ranker == "tfidf":
        return tfidf_ranker(bank)
    if params.hints.ranker == "lift":
        return lift_ranker(read_jsonl(LIFT / "measured.jsonl", LiftRow))
    if params.hints.ranker == "embedding":
        from ragdistill.llm.embed import Embedder

        embedder = Embedder(resolve_model(params.hints.embedder or "", cache_dir("models")))
        return embedding_ranker(embedder, embedder.fingerprint)
    return EVIDENCE
