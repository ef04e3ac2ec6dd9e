"""Miners of single behaviours: preconditions (worked only after …), redundancy, and unused affordances.

Unlike contrast they need no success in the bucket. Their scores are scaled below a clear contrast's, because they
say how to avoid waste, not what finishes the task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from ragdistill.errors import ConfigError
from ragdistill.hints.phrases import affordance_text, precondition_text, redundancy_text
from ragdistill.hints.templates import OBJECT, ROLES, TARGET, generalise, placeholders, skeleton, spread_slots
from ragdistill.hints.views import Played, View, by_bucket, make_hint, share
from ragdistill.params import HintsParams
from ragdistill.records import Hint

_PRECONDITION_WEIGHT = 0.5
_REDUNDANCY_WEIGHT = 0.25
_AFFORDANCE_WEIGHT = 0.25

_MIN_REDUNDANCY = 0.2
"""Smaller differences are single odd commands; naming those would only put them into a small model's mouth."""
_HABIT = 2
"""Trajectories that make a repetition a habit."""

Pair = tuple[str, str]
"""(command template, template that must come first)."""


def mine_preconditions(views: Sequence[View], spread: Collection[tuple[str, int]], params: HintsParams) -> list[Hint]:
    """Templates that were refused and, later in the same trajectory, worked right after another one."""
    hints: list[Hint] = []
    for bucket, group in by_bucket(views).items():
        found: dict[Pair, list[View]] = defaultdict(list)
        refuted: dict[Pair, int] = defaultdict(int)
        for v in group:
            worked, failed = _repairs(v, spread)
            for pair in worked:
                found[pair].append(v)
            for pair in failed:
                refuted[pair] += 1
        best: dict[str, tuple[int, str]] = {}
        for (command, first), where in sorted(found.items()):
            net = len(where) - refuted[command, first]
            if len(where) >= params.min_support and net > best.get(command, (0, ""))[0]:
                best[command] = (net, first)
        for command, (net, first) in best.items():
            where = found[command, first]
            text, score = precondition_text(command, first), _PRECONDITION_WEIGHT * net / len(group)
            hints.append(make_hint(bucket, text, "precondition", len(where), score, (where,)))
    return hints


def _repairs(v: View, spread: Collection[tuple[str, int]]) -> tuple[set[Pair], set[Pair]]:
    """Pairs after which a formerly refused command worked, and pairs after which it was refused all the same."""
    worked: set[Pair] = set()
    failed: set[Pair] = set()
    refused: set[str] = {v.steps[0].raw} if v.steps and not v.steps[0].valid else set()
    for before, p in zip(v.steps, v.steps[1:], strict=False):
        related = before.valid and before.raw != p.raw and _share_entity(before, p)
        if related and not p.valid:
            failed.add(_pair(p.raw, before.raw, spread))
        elif related and p.raw in refused:
            worked.add(_pair(p.raw, before.raw, spread))
        if not p.valid:
            refused.add(p.raw)
    return worked, failed


def _share_entity(a: Played, b: Played) -> bool:
    """A cause acts on something its effect needs; commands without numbered entities cannot tell."""
    return bool(set(a.entities) & set(b.entities)) if a.entities and b.entities else not (a.entities or b.entities)


def _pair(command: str, first: str, spread: Collection[tuple[str, int]]) -> Pair:
    """Generalise both, but keep a name that either of them pins down, so that the two stay tied together."""
    commands, firsts = set(placeholders(generalise(command, spread))), set(placeholders(generalise(first, spread)))
    shared = (set(placeholders(command)) & set(placeholders(first))) - ROLES
    keep = {n for n in shared if n in commands or n in firsts}
    return generalise(command, spread, keep), generalise(first, spread, keep)


def mine_redundancy(views: Sequence[View], params: HintsParams) -> list[Hint]:
    """Commands repeated in vain, clearly more often in failures than in successes.

    A command on the object that works in the bucket's successes is never advised against where it was *refused*: it
    failed for want of a precondition, and the advice would contradict the contrast hint. Nor is the same command with
    another tool: the contrast hint names the right one, and a small model reads "do not cool {object} with
    {countertop}" as a suggestion. Where it was accepted and did the same as before ("search[{object}]"), it is.
    """
    hints: list[Hint] = []
    for bucket, group in by_bucket(views).items():
        wins = sum(v.success for v in group)
        right = {skeleton(p.template) for v in group if v.success for p in v.steps if p.valid and OBJECT in p.template}
        told = _only_in_successes(group)
        vain = {v.id: _vain_repeats(v) for v in group}
        again = {v.id: _same_again(v) for v in group}
        for template in sorted(set().union(*vain.values(), *again.values())):
            beside = skeleton(template) in right or placeholders(template) in told
            where = [v for v in group if template in again[v.id] or (template in vain[v.id] and not beside)]
            won = sum(v.success for v in where)
            score = share(len(where) - won, len(group) - wins) - share(won, wins)
            if len(where) >= max(params.min_support, _HABIT) and score >= _MIN_REDUNDANCY:
                text, lost = redundancy_text(template), [v for v in where if not v.success]
                hints.append(make_hint(bucket, text, "redundancy", len(where), _REDUNDANCY_WEIGHT * score, (lost,)))
    return hints


def _only_in_successes(group: Sequence[View]) -> set[tuple[str, ...]]:
    """Placeholders of accepted commands that no failure has: "use {desklamp}" is a rule that contrast tells.

    "Do not repeat apply {desklamp}" beside it would put the wrong verb into a small model's mouth.
    """
    lost = {p.template for v in group if not v.success for p in v.steps}
    won = {p.template for v in group if v.success for p in v.steps if p.valid} - lost
    return {placeholders(t) for t in won if set(placeholders(t)) - ROLES}


def _vain_repeats(v: View) -> set[str]:
    vain: set[str] = set()
    refused: set[str] = set()
    previous: Played | None = None
    for p in v.steps:
        again = previous is not None and p.action == previous.action and p.observation == previous.observation
        if again or (not p.valid and p.action in refused):
            vain.add(p.template)
        if not p.valid:
            refused.add(p.action)
        previous = p
    return vain


def _same_again(v: View) -> set[str]:
    """Accepted commands on the object that did what they had done before, whatever lay between.

    Only on the object: to come back to a place is how one gets anywhere.
    """
    seen: set[tuple[str, str]] = set()
    again: set[str] = set()
    for p in v.steps:
        if p.valid and OBJECT in p.template:
            again |= {p.template} if (p.action, p.observation) in seen else set()
            seen.add((p.action, p.observation))
    return again


def mine_affordances(views: Sequence[View], params: HintsParams) -> list[Hint]:
    """Commands on a goal entity that the environment offered in failures and no failure of the bucket tried."""
    if not any(v.admissible for v in views):
        raise ConfigError("hints.kinds has `affordance`, but no admissible commands were recorded; "
                          "set rollouts.record_admissible: true.")  # fmt: skip
    spread = spread_slots(t for v in views for t in sorted(v.admissible))
    hints: list[Hint] = []
    for bucket, group in by_bucket(views).items():
        losses = [v for v in group if not v.success]
        tried = {generalise(p.raw, spread) for v in losses for p in v.steps}
        offered: dict[str, list[View]] = defaultdict(list)
        for v in losses:
            for template in {generalise(t, spread) for t in v.admissible}:
                if template not in tried and (OBJECT in template or TARGET in template):
                    offered[template].append(v)
        for template, where in sorted(offered.items()):
            if len(where) >= params.min_support:
                score = _AFFORDANCE_WEIGHT * share(len(where), len(losses))
                hints.append(make_hint(bucket, affordance_text(template), "affordance", len(where), score, (where,)))
    return hints
