"""Weight rules: from what was observed of a window to weights that sum to 1.

A rule is a pure function of an Observation. It answers ``Evaluate`` (merges whose loss it wants to
know first; each costs one merge in memory and one pass over the selection text) or ``Weights``.
K checkpoints, oldest first; ``losses[i]`` is the target loss of checkpoint i on the selection
text in nats. A rule never sees audit or report text: the type holds none.

Add one with ``@rule("name")``; keyword-only arguments become options in params.yaml.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckptfuse.errors import RuleError

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EvaluatedMerge:
    """A merge that was measured: its weights [K] and its target loss on selection, nats."""

    weights: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Observation:
    """All that a rule may know."""

    steps: tuple[int, ...]
    losses: Vector
    merges: tuple[EvaluatedMerge, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def loss_of(self, weights: Vector) -> float | None:
        """The measured loss of the merge with these weights; None when it was not measured."""
        for merge in self.merges:
            if np.array_equal(merge.weights, weights):
                return merge.loss
        return None


@dataclass(frozen=True, slots=True)
class Evaluate:
    """The rule's question: the losses of these merges."""

    vectors: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """The rule's answer; ``notes`` are numbers that explain it."""

    weights: tuple[float, ...]
    notes: Mapping[str, float] = field(default_factory=dict)


Rule = Callable[[Observation], Evaluate | Weights]
_RULES: dict[str, Callable[..., Evaluate | Weights]] = {}


def rule(
    name: str,
) -> Callable[[Callable[..., Evaluate | Weights]], Callable[..., Evaluate | Weights]]:
    """Register a rule by name."""

    def register(function: Callable[..., Evaluate | Weights]) -> Callable[..., Evaluate | Weights]:
        _RULES[name] = function
        return function

    return register


def get_rule(name: str, options: Mapping[str, float] | None = None) -> Rule:
    """The rule of this name with its options bound; raises RuleError for an unknown one."""
    if name not in _RULES:
        raise RuleError(f"rule.name {name!r} is unknown; there are {', '.join(sorted(_RULES))}")
    function = _RULES[name]
    parameters = inspect.signature(function).parameters.values()
    accepted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    chosen = dict(options or {})
    unknown = sorted(chosen.keys() - set(accepted))
    if unknown:
        offers = ", ".join(accepted) or "no options"
        raise RuleError(f"rule {name!r} has no option {unknown[0]!r}; it takes {offers}")

    def bound(observation: Observation) -> Evaluate | Weights:
        answer = function(observation, **chosen)
        vectors = answer.vectors if isinstance(answer, Evaluate) else (answer.weights,)
        for vector in vectors:
            _check_simplex(name, vector, len(observation))
        return answer

    return bound


def _check_simplex(name: str, vector: tuple[float, ...], count: int) -> None:
    ok = (
        len(vector) == count
        and all(weight >= 0 for weight in vector)
        and math.isclose(sum(vector), 1.0, abs_tol=1e-9)
    )
    if not ok:
        raise RuleError(
            f"rule {name!r} answered {list(vector)}: {count} weights, none negative, that sum to 1 "
            "are expected"
        )


@rule("latest")
def latest(seen: Observation) -> Weights:
    """All weight on the newest checkpoint: w_K = 1. A baseline."""
    return _weights(np.eye(len(seen))[-1])


@rule("best")
def best(seen: Observation) -> Weights:
    """All weight on the lowest loss (the newest of equals). A baseline."""
    newest_first = np.argmin(seen.losses[::-1])
    return _weights(np.eye(len(seen))[len(seen) - 1 - newest_first])


@rule("uniform")
def uniform(seen: Observation) -> Weights:
    """w_i = 1/K. LAWA (arXiv 2209.14981), PMA's SMA (arXiv 2505.12082)."""
    return _weights(_uniform(len(seen)))


@rule("inverse-perplexity")
def inverse_perplexity(seen: Observation, *, p: float = 1.0) -> Weights:
    """w_i proportional to perplexity_i^-p = exp(-p l_i): softmax with tau = 1/p.

    The plainest form of weighting by generation quality (Information Fusion 125, 2026, 103415).
    """
    return _weights(_softmax(-p * seen.losses))


@rule("softmax")
def softmax(seen: Observation, *, tau: float = 0.1) -> Weights:
    """w_i proportional to exp(-l_i / tau), tau in nats."""
    if tau <= 0:
        raise RuleError(f"rule 'softmax': tau is {tau}; a positive number of nats is expected")
    return _weights(_softmax(-seen.losses / tau))


@rule("calibrated")
def calibrated(seen: Observation) -> Evaluate | Weights:
    """Weights whose temperature is measured: argmin over the simplex of sum w_i l_i + e sum w_i^2.

    If each checkpoint is a common slow path plus noise of its own, and the loss is locally
    quadratic, a merge's loss is  L(w) = sum w_i l_i - e (1 - sum w_i^2),  with e the noise energy:
    the loss that one checkpoint's noise costs. One measured merge w0 gives it,

        e = (w0 . l - L(w0)) / (1 - sum w0_i^2)         (kept above a small floor)

    and the minimiser is the Euclidean projection of -l / (2e) onto the simplex. w0 is uniform over
    the checkpoints whose loss is not far above the others', so that one damaged checkpoint does
    not inflate e for all. Derivation and measurements: docs/method.md.
    """
    if len(seen) == 1:
        return Weights((1.0,))
    probe = _probe(seen.losses)
    loss = seen.loss_of(probe)
    if loss is None:
        return Evaluate((tuple(probe.tolist()),))
    measured = float(probe @ seen.losses - loss) / float(1 - probe @ probe)
    energy = max(measured, ENERGY_FLOOR)
    weights = project_to_simplex(-seen.losses / (2 * energy))
    predicted = float(weights @ seen.losses) - energy * float(1 - weights @ weights)
    notes = {"noise_energy": measured, "probe_loss": loss, "predicted_loss": predicted}
    return Weights(tuple(weights.tolist()), notes)


#: Nats; below it averaging cannot be told from noise, and the weights go to the lowest loss.
ENERGY_FLOOR = 1e-4
#: Nats; losses within this of the median are never outliers, however tight the others lie.
OUTLIER_SLACK = 0.1


def _probe(losses: Vector) -> Vector:
    """Uniform over the losses at most 6 robust standard deviations above the median (never < 2)."""
    median = float(np.median(losses))
    spread = 1.4826 * float(np.median(np.abs(losses - median)))
    inliers = losses <= median + max(6 * spread, OUTLIER_SLACK)
    return _normalised(np.where(inliers, 1.0, 0.0))


def project_to_simplex(point: Vector) -> Vector:
    """The nearest point with non-negative coordinates that sum to 1, in Euclidean distance.

    Sort and threshold: Duchi et al., ICML 2008, figure 1.
    """
    descending = np.sort(point)[::-1]
    surplus = np.cumsum(descending) - 1
    kept = np.nonzero(descending * np.arange(1, len(point) + 1) > surplus)[0][-1]
    return _normalised(np.maximum(point - surplus[kept] / (kept + 1), 0))


def _uniform(count: int) -> Vector:
    return np.full(count, 1 / count)


def _softmax(scores: Vector) -> Vector:
    return _normalised(np.exp(scores - scores.max()))


def _normalised(values: Vector) -> Vector:
    return np.asarray(values / values.sum(), dtype=np.float64)


def _weights(values: Vector) -> Weights:
    return Weights(tuple(float(value) for value in values))
