"""What a rule is given, and what it answers.

K checkpoints, oldest first. All losses are of selection text, in nats per token. ``loss`` is the
target loss: the mean over domains with the weights of ``corpus.domains``.

Beside each loss stand its values on R resamples of the text's documents, the same resamples for
every model (resampling.py). So the standard error of any figure is the standard deviation of that
figure over the resamples, and what makes a document hard cancels in differences.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def _nothing() -> Vector:
    return np.empty(0)


@dataclass(frozen=True, eq=False)
class Measurement:
    """One model: its target loss, the same on each resample [R], and both for each domain.

    ``resampled`` is empty where too few documents stand behind the loss to know its error.
    """

    loss: float
    resampled: Vector = field(default_factory=_nothing)
    domains: Mapping[str, "Measurement"] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class EvaluatedMerge:
    """A merge that was measured: its weights [K], and what was found."""

    weights: tuple[float, ...]
    measured: Measurement

    @property
    def loss(self) -> float:
        return self.measured.loss


@dataclass(frozen=True, eq=False)
class Observation:
    """All that a rule may know: steps, checkpoints and merges of one window."""

    steps: tuple[int, ...]
    checkpoints: tuple[Measurement, ...]
    merges: tuple[EvaluatedMerge, ...] = ()

    @classmethod
    def of(cls, losses: Sequence[float], steps: Sequence[int] = ()) -> "Observation":
        """Losses alone, without errors or domains: for rules on paper."""
        numbered = tuple(steps) or tuple(range(1, len(losses) + 1))
        return cls(numbered, tuple(Measurement(float(loss)) for loss in losses))

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def losses(self) -> Vector:
        """Target losses [K]."""
        return np.array([item.loss for item in self.checkpoints], dtype=np.float64)

    @cached_property
    def resampled(self) -> Vector:
        """Target losses on the resamples [R, K]; R is 0 unless every checkpoint has them."""
        return stacked([item.resampled for item in self.checkpoints])

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.checkpoints[0].domains)

    def measured(self, weights: Sequence[float] | Vector) -> Measurement | None:
        """What was found of the merge with these weights; None if it was not measured.

        All weight on one checkpoint is that checkpoint.
        """
        wanted = np.asarray(weights)
        if np.count_nonzero(wanted) == 1:
            return self.checkpoints[int(np.argmax(wanted))]
        for merge in self.merges:
            if np.array_equal(merge.weights, wanted):
                return merge.measured
        return None

    def having(self, merges: Sequence[EvaluatedMerge]) -> "Observation":
        """This window with more merges measured."""
        return replace(self, merges=(*self.merges, *merges))

    def within(self, domain: str) -> "Observation":
        """The same window seen on one domain alone."""
        return Observation(
            self.steps,
            tuple(item.domains[domain] for item in self.checkpoints),
            tuple(
                EvaluatedMerge(merge.weights, merge.measured.domains[domain])
                for merge in self.merges
                if domain in merge.measured.domains
            ),
        )

    def newest(self, count: int) -> "Observation":
        """The window of the newest ``count`` checkpoints, with the merges that lie in it."""
        older = len(self) - count
        return Observation(
            self.steps[older:],
            self.checkpoints[older:],
            tuple(
                EvaluatedMerge(merge.weights[older:], merge.measured)
                for merge in self.merges
                if not any(merge.weights[:older])
            ),
        )


@dataclass(frozen=True, eq=False)
class Prediction:
    """The loss that a rule expects of a merge, the same on each resample [R], and how exact it is.

    ``model_error``: the standard error that comes from the rule's model, whatever the text.
    """

    loss: float
    resampled: Vector = field(default_factory=_nothing)
    model_error: float = 0.0

    def error_beside(self, found: Measurement) -> float | None:
        """Standard error of found.loss - loss: the text's, paired, and the model's.

        None where the text's is not known.
        """
        measured, expected = stacked([found.resampled, self.resampled]).T
        of_text = deviation(measured - expected)
        return None if of_text is None else math.hypot(of_text, self.model_error)


def deviation(resampled: Vector) -> float | None:
    """The standard error of a figure from its values on the resamples; None without any."""
    return float(np.std(resampled, ddof=1)) if len(resampled) > 1 else None


def stacked(rows: Sequence[Vector]) -> Vector:
    """[R, len(rows)] from vectors [R]; [0, len(rows)] if they are not all known alike."""
    lengths = {len(row) for row in rows}
    known = lengths == {next(iter(lengths))}
    return np.stack(rows, axis=1) if known else np.empty((0, len(rows)))


@dataclass(frozen=True, slots=True)
class Evaluate:
    """The rule's question: the losses of the merges with these weights, [K] each."""

    vectors: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """The rule's answer, [K].

    ``errors``: standard errors of the weights; ``predicted``: the loss that the rule expected of a
    merge, by its weights; ``notes``: numbers that explain the answer, ``remarks``: sentences that
    do. ``no_gain``: why no merge is worth making, where that is so.
    """

    weights: tuple[float, ...]
    errors: tuple[float, ...] | None = None
    predicted: Mapping[tuple[float, ...], Prediction] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    no_gain: str | None = None


Rule = Callable[[Observation], Evaluate | Weights]
