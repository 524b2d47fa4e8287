"""``calibrated``: perplexity weights whose temperature is measured, and that check themselves.

Two parameters of the loss model are measured in turn, and where it needed the second, a guide::

    uniform merge measured -> e -> weights -> their merge measured -> s -> guide measured -> better
                              |                                                    weights, once
                              not above noise: the newest half,       what the model does not
                              its half, ...; none: no gain expected   explain is said

e is the noise energy, s the noise share (energy.py). The guide has weights by age alone: losses do
not show that neighbours share more than the others, as they do while the learning rate falls. The
better weights lie on the way from the model's own to the guide. Of all that was measured the
lowest is taken. Derivation, measurements: docs/method.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptfuse.rules.energy import Energy, LossModel, energy_of
from ckptfuse.rules.observation import (
    Evaluate,
    Measurement,
    Observation,
    Prediction,
    Vector,
    Weights,
)
from ckptfuse.rules.outliers import healthy
from ckptfuse.rules.registry import rule
from ckptfuse.rules.simplex import as_weights, corner, fading, normalised, padded, uniform_over

#: Nats; other weights that cannot win more than this are not worth a merge and its scoring.
WORTHWHILE = 5e-4
#: How fast the guide's weights fall with age: by a fifth from one checkpoint to the one before it.
GUIDE_ALPHA = 0.2


@rule("calibrated")
def calibrated(seen: Observation) -> Evaluate | Weights:
    """argmin over the simplex of sum w_i l_i - sum w_i (1 - w_i) e_i, with e_i measured.

    The mean noise energy comes from a uniform merge of the checkpoints whose loss is not far above
    the others', so that one damaged checkpoint does not inflate e for all. If e is not above two
    standard errors, averaging does not help over this window: the newest half of it is tried, and
    so on; when none is left no gain is expected. The first weights take all checkpoints to be
    equally noisy. When the merge with them has been measured as well, it shows how much of the
    differences between the losses is noise and not progress (the noise share), and if that is
    worth it the weights are corrected once. What fits neither is remarked, and the answer is then
    the best merge of those measured.

    Cost: one merge; two or three more, together, where e is not above noise; one where corrected.
    """
    if len(seen) == 1:
        return Weights((1.0,))
    probes = _probes(seen.losses)
    tried = []
    for number, probe in enumerate(probes):
        merge = seen.measured(probe.weights)
        if merge is None:
            asked = probes[number:] if number else probes[:1]
            missing = [p.weights for p in asked if seen.measured(p.weights) is None]
            return Evaluate(tuple(as_weights(weights) for weights in missing))
        energy = energy_of(seen, probe.weights, merge)
        tried.append(f"{energy} over {np.count_nonzero(probe.weights)}")
        if energy.is_shown:
            return _checked(seen, probe, energy, tried)
    reason = (
        f"no gain expected: the noise energy is {', '.join(tried)} checkpoints, not above two "
        "standard errors. Averaging removes nothing here, as at the end of a learning-rate decay, "
        "or the checkpoints are too far apart"
    )
    notes = _notes(seen, probes[0].weights)
    lowest = corner(len(seen), int(np.argmin(seen.losses)))
    return Weights(as_weights(lowest), notes=notes, no_gain=reason)


@dataclass(frozen=True, eq=False)
class _Probe:
    """A uniform merge over the healthy ones of the newest ``length`` checkpoints."""

    weights: Vector
    length: int

    @property
    def members(self) -> NDArray[np.bool_]:
        return self.weights > 0


def _probes(losses: Vector) -> list[_Probe]:
    """Of the whole window, its newest half, the half of that ... down to two; no merge twice."""
    count = len(losses)
    found: dict[tuple[float, ...], _Probe] = {}
    length = count
    while True:
        weights = padded(uniform_over(healthy(losses[-length:])), count)
        found.setdefault(as_weights(weights), _Probe(weights, length))
        if length == 2:
            return list(found.values())
        length = (length + 1) // 2


@dataclass(frozen=True, eq=False)
class _Attempt:
    """Weights [K], what they should measure, and the weights on each resample [R, K]."""

    weights: Vector
    predicted: Prediction
    drawn: Vector

    @classmethod
    def of(cls, model: LossModel) -> "_Attempt":
        weights = model.best_weights()
        return cls(weights, model.prediction(weights), model.best_weights_resampled())


def _guide(probe: _Probe) -> Vector:
    """An exponential moving average over the probe's members, as the rule ``ema`` has it."""
    return normalised(np.where(probe.members, fading(len(probe.weights), GUIDE_ALPHA), 0.0))


def _checked(
    seen: Observation, probe: _Probe, energy: Energy, tried: list[str]
) -> Evaluate | Weights:
    """The weights, as far as they can be checked by what has been measured."""
    remarks = _remarks_on_window(seen, probe, tried)
    model = LossModel(seen, probe.members, energy, probe.length)
    attempts = [_Attempt.of(model)]
    merge = seen.measured(attempts[0].weights)
    if merge is None:
        return _answer(seen, probe, model, attempts, attempts[0].weights, remarks)
    candidates = [attempts[0].weights]
    model = model.explaining(attempts[0].weights, merge)
    explained = model.loss(attempts[0].weights)
    if model.share:
        guide = _guide(probe)
        found = seen.measured(guide)
        if found is None:
            return Evaluate((as_weights(guide),))
        candidates.append(guide)
        corrected = _Attempt(*model.towards(guide, found))
        if min(merge.loss, found.loss) - corrected.predicted.loss >= WORTHWHILE:
            attempts.append(corrected)
            merge = seen.measured(corrected.weights)
            if merge is None:
                return _answer(seen, probe, model, attempts, corrected.weights, remarks)
            candidates.append(corrected.weights)
            explained = corrected.predicted.loss
    last = attempts[-1].predicted
    if not _agree(last, merge, explained):
        candidates.append(probe.weights)
        remarks.append(
            f"the loss model does not hold here: a merge of predicted loss {last.loss:.4f} "
            f"measured {merge.loss:.4f}; the weights are those of the lowest merge measured"
        )
    return _answer(seen, probe, model, attempts, _lowest(seen, candidates), remarks)


def _agree(expected: Prediction, found: Measurement, explained: float) -> bool:
    """Within two standard errors of the difference, or within what matters to nobody.

    ``explained``: the loss that the model gives once it has been told of the merge, in nats.
    """
    error = expected.error_beside(found)
    if error is None:  # nothing is known of the text's noise: there is no measure to fail
        return True
    return abs(found.loss - explained) <= max(2 * error, WORTHWHILE / 5)


def _lowest(seen: Observation, candidates: Sequence[Vector]) -> Vector:
    """Of the merges that were measured the one with the lowest loss."""
    found = [(merge.loss, w) for w in candidates if (merge := seen.measured(w)) is not None]
    return min(found, key=lambda pair: pair[0])[1]


def _answer(
    seen: Observation,
    probe: _Probe,
    model: LossModel,
    attempts: list[_Attempt],
    weights: Vector,
    remarks: list[str],
) -> Weights:
    last = attempts[-1]
    is_last = np.array_equal(last.weights, weights)
    expected = last.predicted.loss if is_last else model.loss(weights)
    advantage = model.loss(np.full(len(seen), 1 / len(seen))) - expected
    regret = _regret(seen.resampled[:, probe.members], model.energy)
    notes = _notes(seen, probe.weights) | {
        "predicted_loss": expected,
        "expected_advantage_over_uniform": advantage,
    }
    merge = seen.measured(weights)
    if merge is not None:
        notes["measured_loss"] = merge.loss
    if regret is not None:
        notes["expected_regret"] = regret
        if advantage <= 2 * regret:
            remarks = [*remarks, _indistinguishable(advantage, regret)]
    if model.share is not None:
        notes["noise_share"] = model.share.value
    return Weights(
        as_weights(weights),
        errors=_errors(last.drawn),
        predicted={as_weights(a.weights): a.predicted for a in attempts},
        notes=notes,
        remarks=tuple(remarks),
    )


def _notes(seen: Observation, probe: Vector) -> dict[str, float]:
    """The noise energy of the probe, with its error, for the target and for each domain."""
    merge = seen.measured(probe)
    assert merge is not None, "a probe is measured before anything is made of it"
    notes = {"probe_loss": merge.loss}
    views = {"": seen} | {f".{name}": seen.within(name) for name in seen.domains}
    for suffix, view in views.items():
        part = view.measured(probe)
        if part is None:
            continue
        energy = energy_of(view, probe, part)
        notes[f"noise_energy{suffix}"] = energy.value
        if energy.standard_error is not None:
            notes[f"noise_energy_error{suffix}"] = energy.standard_error
    return notes


def _errors(drawn: Vector) -> tuple[float, ...] | None:
    """Standard errors of the weights: the same rule on each resample of the text."""
    return as_weights(np.std(drawn, axis=0, ddof=1)) if len(drawn) > 1 else None


def _regret(resampled: Vector, energy: Energy) -> float | None:
    """What errors of the losses cost: sum_i var(l_i - mean) / (4e), (K-1) s^2 / (4e) in short."""
    if len(resampled) < 2:
        return None
    centred = resampled - resampled.mean(axis=1, keepdims=True)
    return float(centred.var(axis=0, ddof=1).sum()) / (4 * energy.value)


def _indistinguishable(advantage: float, regret: float) -> str:
    return (
        f"indistinguishable from uniform: {advantage:.4f} nats of expected advantage, of which "
        f"errors of the losses alone would feign {regret:.4f}"
    )


def _remarks_on_window(seen: Observation, probe: _Probe, tried: list[str]) -> list[str]:
    remarks = []
    if len(tried) > 1:
        remarks.append(
            f"only the newest {probe.length} checkpoints count: the noise energy is "
            f"{', '.join(tried)}"
        )
    left_out = [
        str(step)
        for step, weight in list(zip(seen.steps, probe.weights, strict=True))[-probe.length :]
        if not weight
    ]
    if left_out:
        remarks.append(
            f"step {', '.join(left_out)} has no part in the noise energy: its loss is far above "
            "the others'"
        )
    return remarks
