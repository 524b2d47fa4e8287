"""``calibrated``: perplexity weights whose temperature is measured, and that check themselves.

One probe, one answer, one check::

    uniform merge measured -> e -> weights -> their merge measured -> does e explain it too?
                              |                                       no, and it matters: again,
                              not above noise: the newest half,       with the e of that merge;
                              its half, ...; none: no gain expected   then say so, take the lowest

Derivation and measurements: docs/method.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptfuse.rules.energy import (
    Energy,
    energy_of,
    minimiser,
    predicted_loss,
    prediction,
)
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
from ckptfuse.rules.simplex import as_weights, corner, padded, uniform_over

#: Nats; another round that cannot win more than this is not worth a merge and its scoring.
WORTHWHILE = 5e-4


@rule("calibrated")
def calibrated(seen: Observation) -> Evaluate | Weights:
    """argmin over the simplex of sum w_i l_i + e sum w_i^2, with the noise energy e measured.

    e comes from a uniform merge of the checkpoints whose loss is not far above the others', so
    that one damaged checkpoint does not inflate e for all. If e is not above two standard errors,
    averaging does not help over this window: the newest half of it is tried, and so on; when none
    is left no gain is expected. When the merge with the weights has been measured as well, the e
    that it shows must agree within two standard errors; if it does not and the correction is
    worth it, the weights are corrected once. If it still does not, the answer is the best merge of
    those measured, and a remark says that the model of the loss does not hold here.

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
    """Weights that an energy leads to."""

    weights: Vector
    energy: Energy
    predicted: Prediction


def _attempt(seen: Observation, probe: _Probe, energy: Energy) -> _Attempt:
    weights = padded(minimiser(seen.losses[-probe.length :], energy.value), len(seen))
    return _Attempt(weights, energy, prediction(seen, weights, energy, among=probe.members))


def _checked(seen: Observation, probe: _Probe, energy: Energy, tried: list[str]) -> Weights:
    """The weights, as far as they can be checked by what has been measured."""
    remarks = _remarks_on_window(seen, probe, tried)
    attempts = [_attempt(seen, probe, energy)]
    while True:
        last = attempts[-1]
        merge = seen.measured(last.weights)
        if merge is None or np.count_nonzero(last.weights) == 1:
            return _answer(seen, probe, attempts, last.weights, remarks)
        if _agree(last.predicted, merge):
            return _answer(seen, probe, attempts, last.weights, remarks)
        check = energy_of(seen, last.weights, merge)
        following = _attempt(seen, probe, check)
        won = predicted_loss(seen.losses, last.weights, check.value) - following.predicted.loss
        if len(attempts) == 2 or not check.is_shown or won < WORTHWHILE:
            break
        attempts.append(following)
    remarks.append(
        f"the loss model does not hold here: a merge of predicted loss {last.predicted.loss:.4f} "
        f"measured {merge.loss:.4f}; the weights are those of the lowest merge measured"
    )
    return _answer(seen, probe, attempts, _lowest(seen, probe, attempts), remarks)


def _agree(expected: Prediction, found: Measurement) -> bool:
    """Within two standard errors of the difference, or within what matters to nobody."""
    error = expected.error_beside(found)
    if error is None:  # nothing is known of the text's noise: there is no measure to fail
        return True
    return abs(found.loss - expected.loss) <= max(2 * error, WORTHWHILE / 5)


def _lowest(seen: Observation, probe: _Probe, attempts: list[_Attempt]) -> Vector:
    """Of the merges that were measured the one with the lowest loss."""
    found = []
    for weights in (probe.weights, *(attempt.weights for attempt in attempts)):
        merge = seen.measured(weights)
        if merge is not None:
            found.append((merge.loss, weights))
    return min(found, key=lambda pair: pair[0])[1]


def _answer(
    seen: Observation,
    probe: _Probe,
    attempts: list[_Attempt],
    weights: Vector,
    remarks: list[str],
) -> Weights:
    last = attempts[-1]
    advantage = _advantage_over_uniform(seen, last)
    regret = _regret(seen.resampled[:, probe.members], last.energy)
    notes = _notes(seen, probe.weights) | {
        "predicted_loss": predicted_loss(seen.losses, weights, last.energy.value),
        "expected_advantage_over_uniform": advantage,
    }
    merge = seen.measured(weights)
    if merge is not None:
        notes["measured_loss"] = merge.loss
    if regret is not None:
        notes["expected_regret"] = regret
        if advantage <= 2 * regret:
            remarks = [*remarks, _indistinguishable(advantage, regret)]
    if len(attempts) == 2:
        notes["noise_energy_corrected"] = last.energy.value
    return Weights(
        as_weights(weights),
        errors=_errors(seen, last, probe.length),
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


def _errors(seen: Observation, attempt: _Attempt, length: int) -> tuple[float, ...] | None:
    """Standard errors of the weights: the same rule on each resample of the text."""
    energies = attempt.energy.resampled
    if len(energies) < 2:
        return None
    losses = seen.resampled[:, -length:]
    drawn = [minimiser(row, energy) for row, energy in zip(losses, energies, strict=True)]
    return as_weights(padded(np.std(drawn, axis=0, ddof=1), len(seen)))


def _advantage_over_uniform(seen: Observation, attempt: _Attempt) -> float:
    """How much lower the model says the loss is than that of the window's uniform merge."""
    equal = np.full(len(seen), 1 / len(seen))
    return predicted_loss(seen.losses, equal, attempt.energy.value) - attempt.predicted.loss


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
