"""Intervals and tests against published or hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ragdistill import stats


def column(*values: float) -> stats.Floats:
    return np.array(values, dtype=np.float64)[:, None]


@pytest.mark.parametrize(
    ("k", "n", "lo", "hi"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3 (score, no continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 29 / (29 + 1.959964**2), 1.0000),  # by hand: n / (n + z²)
    ],
)
def test_wilson_matches_newcombe_table(k: int, n: int, lo: float, hi: float) -> None:
    got = stats.wilson(k, n)
    assert (got.lo, got.hi) == (pytest.approx(lo, abs=6e-5), pytest.approx(hi, abs=6e-5))
    assert 0.0 <= got.lo <= got.value <= got.hi <= 1.0


def test_wilson_refuses_more_successes_than_trials() -> None:
    with pytest.raises(ValueError, match="successes"):
        stats.wilson(3, 2)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (5, 0, 2 / 2**5),
        (1, 9, 2 * (1 + 10) / 2**10),
        (12, 2, 2 * (1 + 14 + 91) / 2**14),
    ],
)
def test_mcnemar_is_the_exact_binomial(wins: int, losses: int, p: float) -> None:
    assert stats.mcnemar(wins, losses) == pytest.approx(p)
    assert stats.mcnemar(losses, wins) == pytest.approx(p)


@pytest.mark.parametrize("differing", [0, 1])
def test_several_seeds_that_differ_on_one_task_at_most_show_nothing(differing: int) -> None:
    a, b = np.zeros((4, 2)), np.zeros((4, 2))
    a[:differing] = 1.0
    got = stats.paired_test(a, b, draws=100, confidence=0.95)
    assert (got.p, got.n, got.wins) == (1.0, 4, differing)


def test_sign_flip_equals_mcnemar_where_both_apply() -> None:
    """Two identical seeds carry no more information than one: p must be McNemar's."""
    a = np.repeat(column(*[1] * 9, *[0] * 2, *[1] * 4), 2, axis=1)
    b = np.repeat(column(*[0] * 9, *[1] * 2, *[1] * 4), 2, axis=1)
    got = stats.paired_test(a, b, draws=100, confidence=0.95)
    assert (got.wins, got.losses, got.n) == (9, 2, 15)
    assert got.p == pytest.approx(stats.mcnemar(9, 2), abs=1e-9)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    x = column(*[1] * 120, *[0] * 80)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    got = stats.mean_interval(x, draws=4000, confidence=0.95)
    assert got.value == pytest.approx(0.6)
    assert (got.lo, got.hi) == (pytest.approx(0.6 - half, abs=0.01), pytest.approx(0.6 + half, abs=0.01))


def test_bootstrap_is_reproducible() -> None:
    x = column(0.0, 1.0, 2.0, 5.0)
    assert stats.mean_interval(x, 200, 0.9, seed=3) == stats.mean_interval(x, 200, 0.9, seed=3)


def test_rooms_that_behave_alike_widen_the_interval() -> None:
    """40 games in 4 rooms, all games of a room alike: the room bootstrap sees 4 observations, not 40."""
    x = column(*[1.0] * 10, *[0.0] * 10, *[1.0] * 10, *[0.0] * 10)
    rooms = [f"room{i // 10}" for i in range(40)]
    tasks = stats.mean_interval(x, 3000, 0.95)
    clustered = stats.mean_interval(x, 3000, 0.95, groups=rooms)
    assert tasks.lo > 0.3 and tasks.hi < 0.7
    assert (clustered.lo, clustered.hi) == (0.0, 1.0)  # P(all four rooms failing) = 1/16 > 2.5 %


def test_room_bootstrap_is_a_ratio_over_unequal_rooms() -> None:
    """Rooms of 1 and 3 games; the draws (A,A), (A,B), (B,B) give 1, 1/4 and 0, never a mean of room means (1/2)."""
    x = column(1.0, 0.0, 0.0, 0.0)
    draws = stats.bootstrap_means([x], 500, groups=["a", "b", "b", "b"])
    assert set(np.round(draws[:, 0], 9)) == {1.0, 0.25, 0.0}


def test_pairing_removes_variation_between_tasks() -> None:
    difficulty = np.arange(50, dtype=np.float64)[:, None]
    got = stats.paired_interval(difficulty + 2, difficulty, 500, 0.95)
    assert (got.value, got.lo, got.hi) == (pytest.approx(2), pytest.approx(2), pytest.approx(2))


def test_seeds_that_disagree_widen_the_interval() -> None:
    good, bad = np.ones((60, 1)), np.zeros((60, 1))
    two_runs = np.hstack([good, bad])
    got = stats.mean_interval(two_runs, 1000, 0.95)
    assert (got.value, got.lo, got.hi) == (0.5, 0.0, 1.0)


def test_missing_episodes_are_neither_failures_nor_compared() -> None:
    a, b = column(1.0, math.nan, 1.0, 0.0), column(0.0, 0.0, math.nan, 0.0)
    assert stats.mean(a) == pytest.approx(2 / 3)
    assert stats.complete(a, b).tolist() == [True, False, False, True]
    assert not np.isnan(stats.mean_interval(a, 500, 0.95).lo)


def test_ratio_of_means_by_hand_and_without_a_denominator() -> None:
    a, b = column(10.0, 30.0), column(20.0, 60.0)
    got = stats.ratio_interval(a, b, 300, 0.95)
    assert got is not None and (got.value, got.lo, got.hi) == (0.5, 0.5, 0.5)
    assert stats.ratio_interval(a, column(0.0, 0.0), 300, 0.95) is None
