"""Contrast miner: which commands do a bucket's successes share that its failures lack?

Attempts at the same task are compared first and weigh more, since everything but the behaviour is equal there. Where no
attempt at a task won, those that earned most stand for successes if others earned less: with a graded reward a part of
the rule shows before the whole is ever found. Task types of a bucket that have one outcome only contrast nothing.
Commands that any bucket's successes hold (go to, take, move) are the interface, not the rule, and are left out, unless
failures that came to their end (the wrong purchase) lack them: these used the whole interface, so what they lack is a
rule that all buckets share.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ragdistill.hints.phrases import contrast_text, shorten, twice_text
from ragdistill.hints.templates import OBJECT, ROLES, placeholders
from ragdistill.hints.views import View, by_bucket, make_hint, share
from ragdistill.params import HintsParams
from ragdistill.records import Hint

Feature = tuple[str, int]
"""(template, for how many different objects)."""

_PAIR_WEIGHT = 3.0
"""A task with both outcomes counts as much as three without."""
_MIN_SCORE = 0.2
"""Below this difference of shares a template is noise at the usual handful of attempts."""
_GENERIC = 0.5
"""A template this common (relative to the bucket's own share) in other buckets' successes is no rule of the bucket."""
_NEIGHBOUR = 0.5
"""A neighbour is named in the plan when at least this share of the successes has it there."""


def mine_contrast(views: Sequence[View], params: HintsParams) -> list[Hint]:
    """Contrast hints of all buckets; buckets without both outcomes give none."""
    views = _comparable(_graded(views))
    firsts = {v.id: features(v) for v in views}
    common = {b: _success_shares(group, firsts) for b, group in by_bucket(views).items()}
    hints: list[Hint] = []
    for bucket, group in by_bucket(views).items():
        others = [shares for b, shares in common.items() if b != bucket and shares]
        hints += _mine_bucket(bucket, group, firsts, others, params)
    return hints


def _graded(views: Sequence[View]) -> list[View]:
    """The same views, the best attempts at a task that nobody won as successes where others earned less."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for v in views:
        rewards[v.task_id].append(v.reward)
    won = {v.task_id for v in views if v.success}
    best = {task: max(earned) for task, earned in rewards.items() if task not in won and min(earned) < max(earned)}
    return [msgspec.structs.replace(v, success=True) if v.reward == best.get(v.task_id) else v for v in views]


def _comparable(views: Sequence[View]) -> list[View]:
    """Those of task types with both outcomes."""
    outcomes: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for v in views:
        outcomes[v.bucket, v.kind].add(v.success)
    return [v for v in views if len(outcomes[v.bucket, v.kind]) == 2]


def features(v: View) -> dict[Feature, int]:
    """Step index at which each accepted template first occurred, for one object and for a second one."""
    first: dict[Feature, int] = {}
    handled: dict[str, set[str]] = defaultdict(set)
    for p in v.steps:
        if not p.valid:
            continue
        first.setdefault((p.template, 1), p.index)
        if OBJECT in p.template:
            handled[p.template].update(e for e in p.entities if e.rsplit(" ", 1)[0] == v.roles.object)
            if len(handled[p.template]) == 2:
                first.setdefault((p.template, 2), p.index)
    return first


def _success_shares(group: Iterable[View], firsts: Mapping[str, dict[Feature, int]]) -> dict[Feature, float]:
    wins = [v for v in group if v.success]
    counts = Counter(f for v in wins for f in firsts[v.id])
    return {f: n / len(wins) for f, n in counts.items()}


def _mine_bucket(
    bucket: str,
    group: Sequence[View],
    firsts: Mapping[str, dict[Feature, int]],
    others: Sequence[Mapping[Feature, float]],
    params: HintsParams,
) -> list[Hint]:
    wins, losses = [v for v in group if v.success], [v for v in group if not v.success]
    if not wins or not losses:
        return []
    hints: list[Hint] = []
    for score, feature in _without_subsumed(_ranked(wins, losses, firsts, others, params.min_support)):
        having = [v for v in wins if feature in firsts[v.id]]
        lacking = [v for v in losses if feature not in firsts[v.id]]
        text = _phrase(feature, having, firsts, params.max_chars)
        hints.append(make_hint(bucket, text, "contrast", len(having), score, (having, lacking)))
    return hints


def _ranked(
    wins: Sequence[View],
    losses: Sequence[View],
    firsts: Mapping[str, dict[Feature, int]],
    others: Sequence[Mapping[Feature, float]],
    min_support: int,
) -> list[tuple[float, Feature]]:
    """Scored features that are supported and specific to the bucket, best first."""
    support = Counter(f for v in wins for f in firsts[v.id])
    deadline: dict[Feature, int] = {}
    for v in wins:
        for f, i in firsts[v.id].items():
            deadline[f] = max(deadline.get(f, 0), i)
    scored: list[tuple[float, Feature]] = []
    for feature, n in support.items():
        elsewhere = sum(shares.get(feature, 0.0) for shares in others) / max(1, len(others))
        shared = elsewhere >= _GENERIC * n / len(wins)
        against = [v for v in losses if v.finished] if shared else losses
        if n < min_support or (shared and len(against) < min_support):
            continue
        # A failure that did it later than any success ever did has not done it in time.
        latest = deadline[feature]
        having = {v.id for v in (*wins, *against) if firsts[v.id].get(feature, latest + 1) <= latest}
        score = _score(having, wins, against)
        if score >= _MIN_SCORE:
            scored.append((score, feature))
    return sorted(scored, key=lambda x: (-x[0], -support[x[1]], -len(placeholders(x[1][0])), -deadline[x[1]], x[1]))


def _score(having: set[str], wins: Sequence[View], losses: Sequence[View]) -> float:
    """Share of successes with it minus share of failures with it, same-task pairs weighing more."""
    by_task: dict[str, tuple[list[bool], list[bool]]] = defaultdict(lambda: ([], []))
    for v in (*wins, *losses):
        by_task[v.task_id][0 if v.success else 1].append(v.id in having)
    pairs = [share(sum(w), len(w)) - share(sum(f), len(f)) for w, f in by_task.values() if w and f]
    overall = share(sum(v.id in having for v in wins), len(wins))
    overall -= share(sum(v.id in having for v in losses), len(losses))
    lone = len(by_task) - len(pairs)
    return (_PAIR_WEIGHT * sum(pairs) + lone * overall) / (_PAIR_WEIGHT * len(pairs) + lone)


def _without_subsumed(scored: Sequence[tuple[float, Feature]]) -> list[tuple[float, Feature]]:
    """Drop what a better feature already says: "go to {sinkbasin}" beside "clean {object} with {sinkbasin}"."""
    kept: list[tuple[float, Feature]] = []
    for score, (template, times) in scored:
        names = set(placeholders(template)) - ROLES
        said = [set(placeholders(t)) for _, (t, _) in kept]
        told = names and any(names <= s and len(s) > len(names) for s in said) and OBJECT not in template
        repeated = times == 2 and any(n == 2 or t == template for _, (t, n) in kept)
        if not told and not repeated:
            kept.append((score, (template, times)))
    return kept


def _phrase(feature: Feature, wins: Sequence[View], firsts: Mapping[str, dict[Feature, int]], max_chars: int) -> str:
    template, times = feature
    before, after = Counter[str](), Counter[str]()
    for v in wins:
        at = firsts[v.id][template, 1]
        around = [p for p in v.steps if p.valid and OBJECT in p.template and p.template != template]
        before.update([shorten(p.template) for p in around if p.index < at][-1:])
        after.update([shorten(p.template) for p in around if p.index > at][:1])
    if times == 2:
        return twice_text(template, _usual(before, len(wins)), max_chars)
    return contrast_text(template, _usual(before, len(wins)), _usual(after, len(wins)), max_chars)


def _usual(counts: Counter[str], of: int) -> str:
    best = min(counts.items(), key=lambda c: (-c[1], c[0]), default=("", 0))
    return best[0] if best[1] >= _NEIGHBOUR * of else ""
