"""Points of the simplex: weights that are not negative and sum to 1."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckptfuse.rules.observation import Vector


def as_weights(values: Vector | Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def corner(count: int, index: int) -> Vector:
    """All weight on one of ``count`` checkpoints."""
    return np.asarray(np.eye(count)[index])


def uniform_over(chosen: NDArray[np.bool_]) -> Vector:
    """Equal weights for those that are chosen [K]."""
    return normalised(np.where(chosen, 1.0, 0.0))


def normalised(values: Vector) -> Vector:
    """To a sum of 1, along the last axis."""
    return np.asarray(values / values.sum(axis=-1, keepdims=True), dtype=np.float64)


def fading(count: int, alpha: float) -> Vector:
    """(1 - alpha)^age of each checkpoint, oldest first: 1 for the newest. Not normalised."""
    age = np.arange(count, dtype=np.float64)[::-1]
    return np.power(1 - alpha, age)


def softmax(losses: Vector, temperature: float) -> Vector:
    """Proportional to exp(-losses / temperature), safe for any spread of finite losses."""
    with np.errstate(over="ignore"):  # to minus infinity, of which exp is 0
        return normalised(np.exp((losses.min() - losses) / temperature))


def least_on_simplex(linear: Vector, curvature: Vector) -> Vector:
    """argmin of sum_i (linear_i w_i + curvature_i w_i^2), of each row [..., K]; curvatures above 0.

    w_i = max(0, (m - linear_i) / (2 curvature_i)) with the m that makes them sum to 1, found by
    sorting: with equal curvatures this is the Euclidean projection (Duchi et al., ICML 2008).
    """
    order = np.argsort(linear, axis=-1, kind="stable")
    # From 0, so that large values hide no small difference.
    rising = np.take_along_axis(linear, order, -1) - linear.min(axis=-1, keepdims=True)
    give = 1 / (2 * np.take_along_axis(curvature, order, -1))
    levels = (1 + np.cumsum(rising * give, axis=-1)) / np.cumsum(give, axis=-1)
    above = np.flip(levels > rising, axis=-1)
    last = linear.shape[-1] - 1 - np.argmax(above, axis=-1, keepdims=True)
    level = np.take_along_axis(levels, last, -1)
    weights = np.empty(linear.shape)
    np.put_along_axis(weights, order, np.maximum(level - rising, 0) * give, -1)
    return normalised(weights)


def padded(weights: Vector, count: int) -> Vector:
    """Weights [..., n] of the newest checkpoints as weights of ``count``: the older have none."""
    older = np.zeros((*weights.shape[:-1], count - weights.shape[-1]))
    return np.concatenate([older, weights], axis=-1)
