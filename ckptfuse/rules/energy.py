"""Noise energy: the loss that one checkpoint's noise costs, found from one measured merge.

If each checkpoint is a common slow path plus noise of its own, and the loss is locally quadratic,
a merge's loss is the mean of the losses less what averaging cancels::

    L(w)  =  w . l  -  sum_i w_i (1 - w_i) e_i

With the same energy e for all, one measured merge gives it: e = (w . l - L(w)) / (1 - sum w_i^2).
Exactly, for any quadratic loss, L(w) = w . l - 1/2 sum_(i<j) w_i w_j d_ij with d_ij the squared
distance of two checkpoints in the Hessian's metric; the model says that d_ij = 2 (e_i + e_j). So
what a uniform merge finds is the mean of d_ij / 4 over its pairs, whatever they are.

Losses differ because the path falls, or because the energies do, as while the learning rate decays.
The noise share s says how much of the differences is of the second kind::

    e_i  =  e + s (l_i - mean(l)),        0 <= s <= 1

A second measured merge, of weights that follow the losses, gives s: without it s is taken to be 0.
"""

import math
from dataclasses import dataclass, replace

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
from ckptfuse.rules.simplex import least_on_simplex, normalised, padded

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
    """The noise energy, the same for all, that explains a merge's loss.

    ``weights`` [K], not all on one.
    """
    cancelled = float(1 - weights @ weights)
    difference = float(weights @ seen.losses) - merge.loss
    means, merged = stacked([seen.resampled @ weights, merge.resampled]).T
    return Energy(difference / cancelled, (means - merged) / cancelled)


@dataclass(frozen=True, eq=False)
class Share:
    """The noise share, and its values on the resamples of the text [R].

    ``shown_by`` [K]: the weights of the merge that it was found from.
    """

    value: float
    resampled: Vector
    shown_by: Vector


@dataclass(frozen=True, eq=False)
class LossModel:
    """What merges of a window should measure.

    ``among`` [K]: the checkpoints that the energy was measured on; others, damaged or too old, say
    nothing of how different the noise of these is. ``length``: so many of the newest have weights.
    """

    seen: Observation
    among: NDArray[np.bool_]
    energy: Energy
    length: int
    share: Share | None = None

    def loss(self, weights: Vector) -> float:
        """L(w), in nats."""
        return float(_loss(self.seen.losses, weights, self._energies()))

    def best_weights(self) -> Vector:
        """Where on the simplex L(w) is least [K]. Closed form and sparse."""
        return self._minimiser(self.seen.losses, self._energies())

    def best_weights_resampled(self) -> Vector:
        """The same on each resample of the text [R, K]; R is 0 where they are not known."""
        return self._minimiser(*self._resampled())

    def prediction(self, weights: Vector) -> Prediction:
        """L(w) with the text's error and the model's."""
        losses, energies = self._resampled()
        found = _loss(losses, weights, energies)
        return Prediction(self.loss(weights), found, self._model_error(weights))

    def explaining(self, weights: Vector, merge: Measurement) -> "LossModel":
        """This model, which has no noise share yet, with the one that explains a second merge too.

        As it is where the merge does not contradict it by more than two standard errors of the
        text, and where the merge cannot tell: its weights have nothing to do with the losses.
        """
        expected = self.prediction(weights)
        missed, rows = merge.loss - expected.loss, stacked([merge.resampled, expected.resampled])
        error = deviation(rows[:, 0] - rows[:, 1])
        lever = float(_lever(self.seen.losses, self.among, weights))
        if error is None or abs(missed) <= 2 * error or abs(lever) < FLOOR:
            return self
        shares = (rows[:, 0] - rows[:, 1]) / _lever(self.seen.resampled, self.among, weights)
        share = Share(float(np.clip(missed / lever, 0, 1)), np.clip(shares, 0, 1), weights)
        return replace(self, share=share)

    def towards(self, guide: Vector, merge: Measurement) -> tuple[Vector, Prediction, Vector]:
        """The best weights on the way from the model's to those of a measured merge.

        On the way w + t (g - w) the loss is a parabola of curvature q = sum_i e_i (g_i - w_i)^2,
        which begins at the model's L(w) and ends at what the merge measured, L(g)::

            L(t)  =  (1 - t) L(w) + t L(g) - t (1 - t) q,        t  =  1/2 + (L(w) - L(g)) / 2q

        with t in [0, 1]. Where the merge measured what the model expects of it, t is 0. Answers
        with the weights [K], what they should measure, and the weights on each resample [R, K].
        """
        own = self.best_weights()
        way = _Way(self.seen.losses, self._energies(), own, guide)
        step = way.best(merge.loss)
        losses, energies = self._resampled()
        found = merge.resampled if len(merge.resampled) == len(losses) else np.empty(0)
        losses, energies = losses[: len(found)], energies[: len(found)]
        expected = Prediction(
            float(way.loss(step, merge.loss)),
            _Way(losses, energies, own, guide).loss(step, found),
            float(1 - step) * self._model_error(own),
        )
        drawn = _Way(losses, energies, self._minimiser(losses, energies), guide)
        return way.weights(step), expected, drawn.weights(drawn.best(found))

    def _minimiser(self, losses: Vector, energies: Vector) -> Vector:
        curvature = np.maximum(energies, FLOOR)
        count = losses.shape[-1]
        newest = np.s_[..., count - self.length :]
        return padded(least_on_simplex((losses - curvature)[newest], curvature[newest]), count)

    def _energies(self) -> Vector:
        share = self.share.value if self.share else 0.0
        return _energies(self.seen.losses, self.among, self.energy.value, share)

    def _resampled(self) -> tuple[Vector, Vector]:
        """Losses and energies on each resample [R, K]; R is 0 where they are not known alike."""
        losses, energies = self.seen.resampled, self.energy.resampled
        if len(losses) != len(energies):
            return (np.empty((0, len(self.seen))),) * 2
        shares = self.share.resampled if self.share else np.zeros(len(energies))
        return losses, _energies(losses, self.among, energies, shares)

    def _model_error(self, weights: Vector) -> float:
        """How far off L(w) may be because checkpoints differ in their noise, as a standard error.

        At least what energies of the losses' spread, unrelated to the weights, would make of it:
        of its difference to the merge that showed the noise share, where one did. Where none did,
        the loss would be higher by D (``_lever``) if the noise share were 1: weights that follow
        the losses favour checkpoints whose noise happens to be small, which then have less to
        cancel. The truth lies between, so |D| / 2.
        """
        losses, chosen = self.seen.losses[self.among], weights[self.among]
        kept = chosen * (1 - chosen)
        if self.share:
            told = self.share.shown_by[self.among]
            kept = kept - told * (1 - told)
        scattered = float(losses.std() * np.linalg.norm(kept - kept.mean()))
        if self.share:
            return scattered
        return max(abs(float(_lever(self.seen.losses, self.among, weights))) / 2, scattered)


# Below, losses are [K], or [R, K] with an energy, a share and an answer for each row.


@dataclass(frozen=True, eq=False)
class _Way:
    """From weights to others, in the model of these losses; see ``LossModel.towards``."""

    losses: Vector
    energies: Vector
    start: Vector
    end: Vector

    def best(self, found: float | Vector) -> Vector:
        """How far to go, 0 to 1, where ``found`` is the loss at the end."""
        start, bend = _loss(self.losses, self.start, self.energies), self._curvature()
        rise = np.divide(start - found, 2 * bend, out=np.full(bend.shape, -1.0), where=bend > 0)
        return np.asarray(np.clip(0.5 + rise, 0, 1))

    def loss(self, step: Vector, found: float | Vector) -> Vector:
        start = _loss(self.losses, self.start, self.energies)
        return np.asarray((1 - step) * start + step * found - step * (1 - step) * self._curvature())

    def weights(self, step: Vector) -> Vector:
        return normalised(self.start + step[..., None] * (self.end - self.start))

    def _curvature(self) -> Vector:
        return np.asarray(
            np.sum(np.maximum(self.energies, FLOOR) * (self.end - self.start) ** 2, axis=-1)
        )


def _energies(
    losses: Vector, among: NDArray[np.bool_], energy: float | Vector, share: float | Vector
) -> Vector:
    """e_i. The share is at most what leaves the lowest of them above the floor."""
    own = losses[..., among]
    mean = own.mean(axis=-1, keepdims=True)
    room = mean - own.min(axis=-1, keepdims=True)
    above = np.maximum(np.expand_dims(energy, -1) - FLOOR, 0.0)
    most = np.divide(above, room, out=np.full(room.shape, math.inf), where=room > 0)
    shares = np.minimum(np.expand_dims(share, -1), most)
    return np.asarray(np.expand_dims(energy, -1) + shares * (losses - mean))


def _lever(losses: Vector, among: NDArray[np.bool_], weights: Vector) -> Vector:
    """D = sum_i (mean(l) - l_i) w_i (1 - w_i): how much L(w) rises from share 0 to 1."""
    mean = losses[..., among].mean(axis=-1, keepdims=True)
    return np.asarray((mean - losses) @ (weights * (1 - weights)))


def _loss(losses: Vector, weights: Vector, energies: Vector) -> Vector:
    return np.asarray(np.sum(losses * weights - energies * weights * (1 - weights), axis=-1))
