"""Miner of overstepped bounds: the goal names the most that may be paid, and failures paid more.

What all other miners compare is commands; here it is the same command on a page that asks too much. Read are an amount
in the goal ("price lower than 30.00 dollars", "under $30") and those on the page before the last accepted command.
Knows no environment.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from ragdistill.hints.phrases import bound_text
from ragdistill.hints.views import View, by_bucket, make_hint, share
from ragdistill.params import HintsParams
from ragdistill.records import Hint

_AMOUNT = r"(\d[\d,]*(?:\.\d+)?)"
_BOUND = re.compile(rf"\b(?:(?:lower|less|cheaper) than|under|below|at most|no more than|up to) (?:\$ ?)?{_AMOUNT}")
_ASKED = re.compile(rf"\$ ?{_AMOUNT}")
_MIN_SCORE = 0.2
"""As of contrast: a smaller difference of shares is noise."""
_HABIT = 2
"""Failures that make it one."""


class _Closing(msgspec.Struct, frozen=True):
    """How an episode with a bound ended."""

    template: str
    """The last accepted command."""
    above: bool
    """Whether all that the page before it asked was above the bound."""


def mine_bounds(views: Sequence[View], params: HintsParams) -> list[Hint]:
    """Commands that ended failures, and hardly successes, above the goal's bound."""
    hints: list[Hint] = []
    for bucket, group in by_bucket(views).items():
        ends: dict[str, list[tuple[View, bool]]] = defaultdict(list)
        for v in group:
            if closing := _closing(v):
                ends[closing.template].append((v, closing.above))
        for template, found in sorted(ends.items()):
            wins, losses = ([above for v, above in found if v.success == won] for won in (True, False))
            dear = [v for v, above in found if above and not v.success]
            score = share(sum(losses), len(losses)) - share(sum(wins), len(wins))
            if len(dear) >= max(params.min_support, _HABIT) and wins and score >= _MIN_SCORE:
                hints.append(make_hint(bucket, bound_text(template), "contrast", len(dear), score, (dear,)))
    return hints


def _closing(v: View) -> _Closing | None:
    """None unless the environment ended the episode, the goal has a bound and the page before the end an amount."""
    bounds = _BOUND.findall(v.roles.goal)
    last = next((i for i in reversed(range(len(v.steps))) if v.steps[i].valid), 0)
    if not v.finished or not bounds or last == 0:
        return None
    asked = [_number(amount) for amount in _ASKED.findall(v.steps[last - 1].observation)]
    # The price comes last: what stands before it ("under 6 feet") is of the thing itself.
    return _Closing(v.steps[last].template, min(asked) > _number(bounds[-1])) if asked else None


def _number(amount: str) -> float:
    return float(amount.replace(",", ""))
