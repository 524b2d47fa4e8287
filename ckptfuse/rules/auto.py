"""``auto``: several rules over several windows, and the best of them by measurement."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ckptfuse.rules.observation import (
    Evaluate,
    Measurement,
    Observation,
    Weights,
    deviation,
    stacked,
)
from ckptfuse.rules.registry import get_rule, rule
from ckptfuse.rules.simplex import as_weights, padded


class Candidate(BaseModel):
    """A rule over the newest ``last`` checkpoints of the window; null for all of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rule: str
    last: Annotated[int, Field(ge=2)] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    def __str__(self) -> str:
        return self.rule if self.last is None else f"{self.rule} over the newest {self.last}"


#: Simplest first.
USUAL = (
    Candidate(rule="uniform", last=4),
    Candidate(rule="uniform"),
    Candidate(rule="linear"),
    Candidate(rule="softmax"),
    Candidate(rule="calibrated"),
)


@rule("auto")
def auto(
    seen: Observation,
    *,
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)] = USUAL,
) -> Evaluate | Weights:
    """The best of ``candidates`` by paired comparison on selection text.

    Every candidate is taken to its weights and measured; the answer is the first in the list that
    is not worse than the lowest by more than two standard errors of the difference: so list the
    simplest first. Cost: what the candidates ask for, plus a merge each; one job a round for all.
    """
    answers = [_ask(candidate, seen) for candidate in candidates]
    questions = [vector for a in answers if isinstance(a, Evaluate) for vector in a.vectors]
    if questions:
        return Evaluate(tuple(dict.fromkeys(questions)))
    settled = [answer for answer in answers if isinstance(answer, Weights)]
    found = [(answer, seen.measured(answer.weights)) for answer in settled]
    unmeasured = [answer.weights for answer, merge in found if merge is None]
    if unmeasured:
        return Evaluate(tuple(dict.fromkeys(unmeasured)))
    merges = [merge for _, merge in found if merge is not None]
    chosen = _simplest(merges)
    answer = settled[chosen]
    return Weights(
        answer.weights,
        errors=answer.errors,
        predicted={k: v for item in settled for k, v in item.predicted.items()},
        notes={**answer.notes, "measured_loss": merges[chosen].loss},
        remarks=(f"chosen: {candidates[chosen]}", *answer.remarks),
        no_gain=answer.no_gain,
    )


def _ask(candidate: Candidate, seen: Observation) -> Evaluate | Weights:
    """The candidate's answer in its window, in weights of the whole one."""
    length = min(candidate.last or len(seen), len(seen))
    answer = get_rule(candidate.rule, candidate.options)(seen.newest(length))

    def whole(vector: Sequence[float]) -> tuple[float, ...]:
        return as_weights(padded(np.asarray(vector), len(seen)))

    if isinstance(answer, Evaluate):
        return Evaluate(tuple(whole(vector) for vector in answer.vectors))
    errors = None if answer.errors is None else whole(answer.errors)
    return Weights(
        whole(answer.weights),
        errors=errors,
        predicted={whole(vector): loss for vector, loss in answer.predicted.items()},
        notes=answer.notes,
        remarks=answer.remarks,
        no_gain=answer.no_gain,
    )


def _simplest(merges: Sequence[Measurement]) -> int:
    """The first that is within two standard errors of the lowest, by paired differences."""
    lowest = min(merges, key=lambda merge: merge.loss)
    for index, merge in enumerate(merges):
        mine, least = stacked([merge.resampled, lowest.resampled]).T
        if merge.loss - lowest.loss <= 2 * (deviation(mine - least) or 0.0):
            return index
    raise AssertionError("the lowest is within any distance of itself")
