"""A small Gaussian process: losses as a smooth function of weights. Rasmussen and Williams, 2006.

Squared-exponential kernel around the mean of the values, with the amplitude and, of a short list,
the length under which the data are most likely (algorithm 2.1). Losses on a fixed text repeat to
the last bits, so the only noise is a jitter for the sake of the factorisation.
"""

import math
from dataclasses import dataclass

import numpy as np

from ckptfuse.rules.observation import Vector

LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
JITTER = 1e-6


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """Points [N, K], their values' mean, and Cholesky's factor of the kernel between them."""

    points: Vector
    mean: float
    amplitude: float
    length: float
    factor: Vector
    solved: Vector  # kernel^-1 times the values, less their mean

    def predict(self, points: Vector) -> tuple[Vector, Vector]:
        """Mean and standard deviation at ``points`` [M, K], in the unit of the values."""
        cross = _kernel(points, self.points, self.length)
        whitened = np.linalg.solve(self.factor, cross.T)
        variance = np.maximum(1 - (whitened**2).sum(axis=0), 0)
        return self.mean + cross @ self.solved, self.amplitude * np.sqrt(variance)

    def believing(self, points: Vector, values: Vector) -> "GaussianProcess":
        """The same process with other data."""
        return _at(points, values, self.length)[0]


def fit(points: Vector, values: Vector) -> GaussianProcess:
    """``points`` [N, K] with values [N]; N is at least 1."""
    fits = [_at(points, values, length) for length in LENGTHS]
    return max(fits, key=lambda pair: pair[1])[0]


def _at(points: Vector, values: Vector, length: float) -> tuple[GaussianProcess, float]:
    """The process of one length, and the log likelihood of the data under it."""
    mean = float(values.mean())
    kernel = _kernel(points, points, length) + JITTER * np.eye(len(points))
    factor = np.asarray(np.linalg.cholesky(kernel), dtype=np.float64)
    solved = np.linalg.solve(factor.T, np.linalg.solve(factor, values - mean))
    variance = max(float((values - mean) @ solved) / len(values), np.finfo(float).tiny)
    likelihood = -0.5 * len(values) * math.log(variance) - float(np.log(np.diag(factor)).sum())
    return GaussianProcess(points, mean, math.sqrt(variance), length, factor, solved), likelihood


def _kernel(left: Vector, right: Vector, length: float) -> Vector:
    squared = ((left[:, None, :] - right[None, :, :]) ** 2).sum(axis=2)
    return np.asarray(np.exp(-squared / (2 * length**2)))


def expected_improvement(mean: Vector, error: Vector, *, lowest: float) -> Vector:
    """E[max(lowest - f, 0)] for normal f (Jones et al., J. Global Optimization 13, 1998)."""
    error = np.maximum(error, 1e-12)
    z = (lowest - mean) / error
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + _erf(z / math.sqrt(2)))
    return np.asarray((lowest - mean) * below + error * density)


def _erf(values: Vector) -> Vector:
    return np.array([math.erf(value) for value in values])
