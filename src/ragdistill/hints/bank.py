"""The hint bank: per bucket a short, ranked, deduplicated list, with an audit of all that was left out.

Knows neither how hints were found nor how they are shown. On disk it is readable JSONL, one hint a line.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from ragdistill.errors import DataError, EmptyResultError
from ragdistill.hints.safety import refusal
from ragdistill.hints.templates import placeholders
from ragdistill.hints.views import EVIDENCE
from ragdistill.params import HintsParams
from ragdistill.records import Hint, Record, read_jsonl

_NEGATION = re.compile(r"\b(?:not|never|no|avoid|don't|without|stop)\b", re.IGNORECASE)

Bank = dict[str, tuple[Hint, ...]]
"""Bucket → hints, best first."""


class AuditEntry(Record, frozen=True, kw_only=True):
    """One hint that is not in the bank, and why."""

    outcome: Literal["merged", "refused", "capped"]
    bucket: str
    id: str
    text: str
    kept_id: str = ""
    """The hint it was merged into."""
    kept_text: str = ""
    similarity: float = 0.0
    reason: str = ""


def rank(hint: Hint) -> tuple[float, float, int, str]:
    """Sort key, best first: measured lift (unmeasured = 0, so harmful ones sink), score, mentions, id."""
    return -(hint.lift or 0.0), -hint.score, -hint.mentions, hint.id


def build_bank(hints: Iterable[Hint], params: HintsParams) -> tuple[Bank, list[AuditEntry]]:
    """Check, deduplicate, rank and cap; also merges banks (pass the hints of all).

    Raises `EmptyResultError` when no hint is left.
    """
    audit: list[AuditEntry] = []
    groups: dict[str, list[Hint]] = defaultdict(list)
    for h in sorted(hints, key=lambda h: (h.bucket, rank(h), h.text, h.evidence)):
        if reason := refusal(h.text, params.max_chars):
            audit.append(AuditEntry(outcome="refused", bucket=h.bucket, id=h.id, text=h.text, reason=reason))
        else:
            groups[h.bucket].append(h)
    bank: Bank = {}
    for bucket, group in sorted(groups.items()):
        ranked = sorted(_dedup(group, params.dedup, audit), key=rank)
        bank[bucket] = tuple(ranked[: params.per_bucket])
        for h in ranked[params.per_bucket :]:
            reason = f"beyond hints.per_bucket {params.per_bucket}"
            audit.append(AuditEntry(outcome="capped", bucket=bucket, id=h.id, text=h.text, reason=reason))
    if not bank:
        raise EmptyResultError(
            f"All {len(audit)} hints were refused by the safety check; see the audit file, "
            "raise hints.max_chars or use another extractor."
        )
    return bank, audit


def _dedup(group: Iterable[Hint], threshold: float, audit: list[AuditEntry]) -> list[Hint]:
    """Greedy from the best down: each hint joins the most similar kept one at or above `threshold`."""
    kept: list[Hint] = []
    for h in group:
        near = max(((similarity(k.text, h.text), -i) for i, k in enumerate(kept)), default=(-1.0, 0))
        if near[0] < threshold:
            kept.append(h)
            continue
        k = kept[-near[1]]
        kept[-near[1]] = _merge(k, h)
        audit.append(
            AuditEntry(
                outcome="merged", bucket=h.bucket, id=h.id, text=h.text, kept_id=k.id, kept_text=k.text,
                similarity=round(near[0], 4),
            )
        )  # fmt: skip
    return kept


def similarity(a: str, b: str) -> float:
    """Character similarity in [0, 1]; 0 when the placeholders differ or only one of the two is a negation.

    Sentences of one mould differ in few characters ("use {desklamp}", "do not use {floorlamp}") and say another thing.
    """
    if set(placeholders(a)) != set(placeholders(b)) or bool(_NEGATION.search(a)) != bool(_NEGATION.search(b)):
        return 0.0
    first, second = sorted((a.lower(), b.lower()))
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def _merge(kept: Hint, other: Hint) -> Hint:
    return msgspec.structs.replace(
        kept,
        mentions=kept.mentions + other.mentions,
        score=max(kept.score, other.score),
        lift=other.lift if kept.lift is None else kept.lift,
        evidence=tuple(dict.fromkeys((*kept.evidence, *other.evidence)))[:EVIDENCE],
    )


def hints_of(bank: Bank) -> list[Hint]:
    """All hints, bucket by bucket, best first."""
    return [h for bucket in sorted(bank) for h in bank[bucket]]


def load_bank(path: Path, params: HintsParams) -> Bank:
    """Read a bank; `DataError` names file, line and reason when a text is unsafe or a line is damaged."""
    groups: dict[str, list[Hint]] = defaultdict(list)
    for line, h in enumerate(read_jsonl(path, Hint), 1):
        if reason := refusal(h.text, params.max_chars):
            raise DataError(f"{path}:{line} holds an unsafe hint ({reason}); delete or reword the line.")
        groups[h.bucket].append(h)
    return {bucket: tuple(sorted(group, key=rank)) for bucket, group in sorted(groups.items())}
