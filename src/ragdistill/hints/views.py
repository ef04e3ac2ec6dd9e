"""Trajectories as the miners see them: steps lifted into templates, outcomes, evidence. Knows no hint text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ragdistill.hints.templates import (
    Roles,
    entities,
    entity_names,
    generalise,
    lift,
    normalise,
    roles_of,
    spread_slots,
)
from ragdistill.records import Hint, HintKind, StopReason, Trajectory, digest

EVIDENCE = 20
"""Most trajectory ids kept with one hint."""


class Played(msgspec.Struct, frozen=True):
    """One step with an action."""

    action: str
    """Normalised."""
    raw: str
    """Template that keeps every entity's name."""
    template: str
    """Template with spread slots generalised."""
    entities: tuple[str, ...]
    valid: bool
    observation: str
    index: int
    """Position in the episode."""


class View(msgspec.Struct, frozen=True):
    """One trajectory, lifted."""

    id: str
    task_id: str
    bucket: str
    kind: str
    """Type of the task; a bucket may hold several."""
    success: bool
    reward: float
    roles: Roles
    steps: tuple[Played, ...]
    admissible: frozenset[str]
    """Raw templates the environment offered, if recorded."""
    finished: bool = False
    """The environment ended the episode (won, or e.g. the wrong purchase): the interface was used to its end."""


def lift_all(trajectories: Iterable[Trajectory]) -> tuple[list[View], frozenset[tuple[str, int]]]:
    """Views in id order, without infrastructure failures, and the slots found to be spread."""
    kept = sorted((t for t in trajectories if t.stop is not StopReason.INFRA_ERROR), key=lambda t: t.id)
    names = entity_names(kept)
    views = [_view(t, roles_of(t, names)) for t in kept]
    spread = spread_slots(r for v in views for r in sorted({p.raw for p in v.steps if p.valid}))
    return [_generalised(v, spread) for v in views], spread


def _view(t: Trajectory, roles: Roles) -> View:
    steps, offered = [], set()
    for i, s in enumerate(t.steps):
        offered.update(lift(a, roles).template for a in s.admissible)
        action = normalise(s.action)
        # A command that already holds braces is a hint copied verbatim, not something the agent knew.
        if not action or "{" in action or "}" in action:
            continue
        raw = lift(action, roles).template
        mentioned = tuple(entities(action))
        steps.append(Played(action, raw, raw, mentioned, s.valid, s.observation, i))
    finished = t.stop in (StopReason.SUCCESS, StopReason.FAILURE)
    return View(
        t.id, t.task_id, t.bucket, t.kind, t.success, t.reward, roles, tuple(steps), frozenset(offered), finished
    )


def _generalised(v: View, spread: frozenset[tuple[str, int]]) -> View:
    steps = tuple(msgspec.structs.replace(p, template=generalise(p.raw, spread)) for p in v.steps)
    return msgspec.structs.replace(v, steps=steps)


def by_bucket(views: Iterable[View]) -> Mapping[str, list[View]]:
    """Views per bucket, buckets in name order."""
    groups: dict[str, list[View]] = defaultdict(list)
    for v in views:
        groups[v.bucket].append(v)
    return dict(sorted(groups.items()))


def share(part: int, whole: int) -> float:
    """part / whole; 0 of nothing."""
    return part / whole if whole else 0.0


def make_hint(
    bucket: str, text: str, kind: HintKind, mentions: int, score: float, evidence: Sequence[Iterable[View]]
) -> Hint:
    """A `Hint` whose evidence takes an equal part of `EVIDENCE` from each group of views, in id order."""
    quota = EVIDENCE // len(evidence)
    ids = tuple(v.id for group in evidence for v in sorted(group, key=lambda v: v.id)[:quota])
    return Hint(
        id=hint_id(bucket, text), bucket=bucket, text=text, kind=kind, evidence=ids, mentions=mentions,
        score=round(score, 6),
    )  # fmt: skip


def hint_id(bucket: str, text: str) -> str:
    """A hint's id is its content."""
    return digest("hint", bucket, text)
