"""Spikes: what leaves the trend upwards, and what only looks like it."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfuse.spikes import excess_over_trend


def marks(losses: Sequence[float]) -> list[float | None]:
    steps = [100 * n for n in range(1, len(losses) + 1)]
    return [excess_over_trend(steps[: n + 1], losses[: n + 1]) for n in range(len(losses))]


def noisy(losses: np.ndarray, deviation: float = 0.01) -> np.ndarray:
    return losses + np.random.default_rng(0).normal(0, deviation, len(losses))


def test_a_jump_above_the_trend_is_a_spike_and_what_follows_it_is_not() -> None:
    losses = noisy(np.linspace(4.0, 3.5, 20))
    losses[12] += 0.5
    found = marks(losses)
    assert [n for n, mark in enumerate(found) if mark is not None] == [12]
    assert found[12] == pytest.approx(0.5, abs=0.1)


def test_a_better_checkpoint_than_expected_is_none() -> None:
    losses = noisy(np.linspace(4.0, 3.5, 20))
    losses[12] -= 0.5
    assert marks(losses) == [None] * 20


@given(
    start=st.floats(4, 11), end=st.floats(1.5, 3.5), power=st.floats(0.1, 2),
    count=st.integers(2, 40),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_a_curve_that_flattens_has_no_spikes(
    start: float, end: float, power: float, count: int
) -> None:
    losses = end + (start - end) * np.arange(1, count + 1) ** -power
    assert marks(losses.tolist()) == [None] * count


def test_noise_alone_is_none() -> None:
    assert sum(mark is not None for mark in marks(noisy(np.full(300, 3.0), 0.05))) <= 3


def test_a_level_that_stays_high_becomes_the_new_trend() -> None:
    losses = noisy(np.concatenate([np.full(12, 3.0), np.full(12, 3.6)]))
    found = [n for n, mark in enumerate(marks(losses)) if mark is not None]
    assert found[0] == 12
    assert found[-1] < 18


def test_a_mark_never_changes_as_training_goes_on() -> None:
    losses = noisy(np.linspace(4.0, 3.5, 20))
    losses[8] += 1
    for end in range(9, 20):
        assert marks(losses[:end]) == marks(losses)[:end]


def test_too_little_history_says_nothing() -> None:
    assert marks([3.0, 3.0, 3.0, 9.0]) == [None] * 4
    assert marks([3.0, 3.0, 3.0, 3.0, 9.0])[-1] == pytest.approx(6.0)
    assert marks([3.0]) == [None]
