"""Offline hint extraction: no LLM, deterministic, free. Trajectories in, raw hints out (`bank` dedups and checks).

Knows no environment: everything is read from `records.Trajectory`. The order of the input does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable

from ragdistill.errors import EmptyResultError
from ragdistill.hints.bounds import mine_bounds
from ragdistill.hints.contrast import mine_contrast
from ragdistill.hints.habits import mine_affordances, mine_preconditions, mine_redundancy
from ragdistill.hints.views import lift_all
from ragdistill.params import HintsParams
from ragdistill.records import Hint, Trajectory


def mine(trajectories: Iterable[Trajectory], params: HintsParams) -> list[Hint]:
    """Hints of the kinds in `params.kinds`, sorted by bucket, then score.

    Raises `EmptyResultError` when nothing succeeded or nothing was found, `ConfigError` when affordances are asked for
    but were not recorded. Episodes that ended as `infra_error` are ignored.
    """
    views, spread = lift_all(trajectories)
    if not any(v.success for v in views):
        raise EmptyResultError(
            f"None of {len(views)} rollouts succeeded, so there is nothing to contrast failures with; "
            "raise rollouts.attempts or rollouts.temperature, or use a stronger base model."
        )
    hints: list[Hint] = []
    if "contrast" in params.kinds:
        hints += mine_contrast(views, params) + mine_bounds(views, params)
    if "precondition" in params.kinds:
        hints += mine_preconditions(views, spread, params)
    if "redundancy" in params.kinds:
        hints += mine_redundancy(views, params)
    if "affordance" in params.kinds:
        hints += mine_affordances(views, params)
    if not hints:
        raise EmptyResultError(
            f"{len(views)} rollouts held no pattern with hints.min_support {params.min_support}; "
            "raise rollouts.attempts or tasks.train, or lower hints.min_support."
        )
    return sorted(hints, key=lambda h: (h.bucket, -h.score, -h.mentions, h.id))
