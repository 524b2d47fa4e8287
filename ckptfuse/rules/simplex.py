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
    return np.asarray(values / values.sum(), dtype=np.float64)


def softmax(losses: Vector, temperature: float) -> Vector:
    """Proportional to exp(-losses / temperature), safe for any spread of finite losses."""
    with np.errstate(over="ignore"):  # to minus infinity, of which exp is 0
        return normalised(np.exp((losses.min() - losses) / temperature))


def project_to_simplex(point: Vector) -> Vector:
    """The nearest point with non-negative coordinates that sum to 1, in Euclidean distance.

    Sort and threshold: Duchi et al., ICML 2008, figure 1.
    """
    point = point - point.max()  # moves no projection, and keeps 1 visible beside large values
    descending = np.sort(point)[::-1]
    surplus = np.cumsum(descending) - 1
    kept = np.nonzero(descending * np.arange(1, len(point) + 1) > surplus)[0][-1]
    return normalised(np.maximum(point - surplus[kept] / (kept + 1), 0))


def padded(weights: Vector, count: int) -> Vector:
    """Weights of the newest checkpoints as weights of ``count``: the older ones have none."""
    return np.concatenate([np.zeros(count - len(weights)), weights])
