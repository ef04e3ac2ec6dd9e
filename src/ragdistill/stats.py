"""Intervals and paired tests on grids of episodes (tasks × training seeds).

What counts as one observation is a *task*, not an episode: training seeds play the same tasks. Missing cells (NaN:
infrastructure errors, never failures) are left out of every mean and counted by whoever builds the grid.
This module knows no policy, file or metric name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, permutation_test

Floats = NDArray[np.float64]

_BLOCK = 500
"""Draws held in memory at once: 500 × 3,000 tasks × 8 bytes = 12 MB."""
_FLIPS = 9_999
"""Monte-Carlo sign flips; the smallest p they can give is 1e-4, one unit of the four decimals we print."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class PairedTest:
    """`a` − `b` over tasks that both finished, with the p-value of "no difference"."""

    diff: Interval
    p: float
    n: int
    """Tasks compared."""
    wins: int
    """Tasks on which `a` is better."""
    losses: int


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927).

    `successes` may be fractional: the sum over tasks of the success share over seeds, with `n` tasks. That treats the
    seeds of a task as fully dependent, so the interval does not shrink by playing one task many times.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"Need 0 <= successes <= n and n >= 1, got {successes} of {n}.")
    z = float(norm.ppf(0.5 + confidence / 2))
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p)))


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided McNemar p-value from the discordant pairs (a binomial test with 1/2); 1.0 without any."""
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def bootstrap_means(grids: Sequence[Floats], draws: int, groups: Sequence[str] | None = None, seed: int = 0) -> Floats:
    """Bootstrap means of each grid, `draws` × grids, all from the *same* resampled tasks (so differences are paired).

    Args:
        grids: arrays tasks × seeds over the same tasks, NaN where an episode is missing.
        draws: number of resamples.
        groups: one label a task; whole groups (rooms) are resampled instead of tasks.
        seed: of the random generator; the same call gives the same numbers.

    Where a grid has several seeds they are resampled too, independently for each grid, so that the interval also
    holds the variation between training runs. With two or three seeds that part is a rough (too small) estimate.
    A draw without any finished episode is NaN.
    """
    n = grids[0].shape[0]
    if n == 0 or any(g.shape[0] != n for g in grids):
        raise ValueError("Grids must hold the same tasks, at least one.")
    rng = np.random.default_rng(seed)
    labels = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    units = int(labels.max()) + 1
    out = np.empty((draws, len(grids)))
    for start in range(0, draws, _BLOCK):
        block = min(_BLOCK, draws - start)
        weights = _counts(rng, units, block)[:, labels]
        for column, grid in enumerate(grids):
            by_seed = _counts(rng, grid.shape[1], block)
            total = ((weights @ np.nan_to_num(grid)) * by_seed).sum(axis=1)
            count = ((weights @ np.isfinite(grid).astype(np.float64)) * by_seed).sum(axis=1)
            cells = np.full(block, np.nan)
            np.divide(total, count, out=cells, where=count > 0)
            out[start : start + block, column] = cells
    return out


def _counts(rng: np.random.Generator, units: int, draws: int) -> Floats:
    """How often each unit is drawn when `units` are drawn with replacement; draws × units."""
    return rng.multinomial(units, np.full(units, 1 / units), size=draws).astype(np.float64)


def percentile(value: float, samples: Floats, confidence: float) -> Interval:
    """The percentile interval of bootstrap `samples` around the point estimate `value`."""
    tail = (1 - confidence) / 2
    lo, hi = np.nanquantile(samples, [tail, 1 - tail])
    return Interval(value, float(lo), float(hi))


def mean(grid: Floats) -> float:
    """Mean over all finished episodes."""
    return float(np.nanmean(grid))


def mean_interval(
    grid: Floats, draws: int, confidence: float, groups: Sequence[str] | None = None, seed: int = 0
) -> Interval:
    """Mean with its bootstrap interval, over tasks or, with `groups`, over rooms (see `bootstrap_means`)."""
    return percentile(mean(grid), bootstrap_means([grid], draws, groups, seed)[:, 0], confidence)


def complete(a: Floats, b: Floats) -> NDArray[np.bool_]:
    """Tasks on which no episode of either side is missing: only these are compared."""
    return np.asarray(np.isfinite(np.hstack([a, b])).all(axis=1))


def paired_interval(
    a: Floats, b: Floats, draws: int, confidence: float, groups: Sequence[str] | None = None, seed: int = 0
) -> Interval:
    """Mean of `a` − `b` over the same tasks with its bootstrap interval; both grids must be complete.

    A percentile interval is too narrow when almost no task differs (all equal gives zero width): read it with `n`,
    wins and losses.
    """
    samples = bootstrap_means([a, b], draws, groups, seed)
    return percentile(mean(a) - mean(b), samples[:, 0] - samples[:, 1], confidence)


def ratio_interval(a: Floats, b: Floats, draws: int, confidence: float, seed: int = 0) -> Interval | None:
    """Ratio of the means of `a` and `b` over the same tasks; None where the mean of `b` is not positive."""
    samples = bootstrap_means([a, b], draws, None, seed)
    if mean(b) <= 0 or not (samples[:, 1] > 0).all():
        return None
    return percentile(mean(a) / mean(b), samples[:, 0] / samples[:, 1], confidence)


def paired_test(a: Floats, b: Floats, draws: int, confidence: float, seed: int = 0) -> PairedTest:
    """Difference of success shares over complete grids (0/1 cells) with interval and p-value.

    One seed on both sides: exact McNemar. Several seeds: seeds are averaged per task and the signs of the task
    differences are flipped at random (`scipy.stats.permutation_test`), which is McNemar's test when the differences
    are −1, 0 and 1. The p-value speaks about tasks, for these trained models; only the interval also resamples seeds.
    """
    delta = a.mean(axis=1) - b.mean(axis=1)
    wins, losses = int((delta > 0).sum()), int((delta < 0).sum())
    p = mcnemar(wins, losses) if a.shape[1] == b.shape[1] == 1 else _sign_flip(delta, seed)
    return PairedTest(paired_interval(a, b, draws, confidence, None, seed), p, len(delta), wins, losses)


def _sign_flip(delta: Floats, seed: int) -> float:
    if np.count_nonzero(delta) < 2:
        return 1.0  # of one difference both signs are as extreme; scipy refuses to flip fewer than two
    # Rounding makes equal sums equal: 1/3 + 1/3 + 1/3 in another order must not look "more extreme".
    result = permutation_test(
        (delta[delta != 0],), lambda x, axis: np.round(np.mean(x, axis=axis), 12), permutation_type="samples",
        vectorized=True, n_resamples=_FLIPS, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)
