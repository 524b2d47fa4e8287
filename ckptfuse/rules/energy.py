"""Noise energy: the loss that one checkpoint's noise costs, found from one measured merge.

If each checkpoint is a common slow path plus noise of its own, and the loss is locally quadratic,
a merge's loss is the mean of the losses less what averaging cancels::

    L(w)  =  w . l  -  e (1 - sum w_i^2)        so        e = (w . l - L(w)) / (1 - sum w_i^2)

Exactly, for any quadratic loss, L(w) = w . l - 1/2 sum_(i<j) w_i w_j d_ij with d_ij the squared
distance of two checkpoints in the Hessian's metric; the model says that all d_ij are 4e. So what
a uniform merge finds is the mean of d_ij / 4 over its pairs, whatever they are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptfuse.rules.observation import (
    Measurement,
    Observation,
    Prediction,
    Vector,
    deviation,
    stacked,
)
from ckptfuse.rules.simplex import project_to_simplex

#: Nats; what averaging could win below it is nothing to anybody.
FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class Energy:
    """Noise energy in nats, and its values on the resamples of the text [R]."""

    value: float
    resampled: Vector

    @property
    def standard_error(self) -> float | None:
        """From sampling documents; None where it is not known."""
        return deviation(self.resampled)

    @property
    def is_shown(self) -> bool:
        """Above the floor and above two standard errors."""
        return self.value > max(FLOOR, 2 * (self.standard_error or 0.0))

    def __str__(self) -> str:
        error = self.standard_error
        return f"{self.value:+.4f}" + ("" if error is None else f" +- {error:.4f}")


def energy_of(seen: Observation, weights: Vector, merge: Measurement) -> Energy:
    """The noise energy that explains a merge's loss. ``weights`` [K], not all on one."""
    cancelled = float(1 - weights @ weights)
    difference = float(weights @ seen.losses) - merge.loss
    means, merged = stacked([seen.resampled @ weights, merge.resampled]).T
    return Energy(difference / cancelled, (means - merged) / cancelled)


def predicted_loss(losses: Vector, weights: Vector, energy: float) -> float:
    """L(w) = w . l - e (1 - sum w_i^2), in nats."""
    return float(weights @ losses) - energy * float(1 - weights @ weights)


def prediction(
    seen: Observation, weights: Vector, energy: Energy, *, among: NDArray[np.bool_]
) -> Prediction:
    """The expected loss of a merge, with the model's standard error.

    ``among`` [K]: the checkpoints that the energy was measured on; others, damaged or too old, say
    nothing of how different the noise of these is.
    """
    cancelled = float(1 - weights @ weights)
    means, energies = seen.resampled @ weights, energy.resampled
    return Prediction(
        predicted_loss(seen.losses, weights, energy.value),
        means - energies * cancelled if len(means) == len(energies) else np.empty(0),
        _model_error(seen.losses[among], weights[among]),
    )


def _model_error(losses: Vector, weights: Vector) -> float:
    """How far off L(w) may be because checkpoints differ in their noise, as a standard error.

    The model takes all differences of the losses for differences of the path. If they were the
    checkpoints' own noise instead, with energies e + l_i - mean(l), the loss would be higher by
    D = sum_i (mean(l) - l_i) w_i (1 - w_i): weights that follow the losses favour those whose
    noise happens to be small, which then have less to cancel. The truth lies between, so |D| / 2;
    at least what energies of that spread, unrelated to the weights, would make of it.
    """
    share = weights * (1 - weights)
    biased = abs(float((losses - losses.mean()) @ share)) / 2
    return max(biased, float(losses.std() * np.linalg.norm(share - share.mean())))


def minimiser(losses: Vector, energy: float) -> Vector:
    """Where on the simplex L(w) is least: the projection of -l / (2e). Closed form and sparse."""
    return project_to_simplex(-(losses - losses.min()) / (2 * max(energy, FLOOR)))
