"""From a window's losses to its weights: the rounds between a rule and its evaluations."""

from collections.abc import Callable, Sequence

import numpy as np

from ckptfuse.errors import RuleError
from ckptfuse.rules import Evaluate, EvaluatedMerge, Observation, Rule, Weights

MAX_ROUNDS = 64

#: Measures the target loss on selection of the merge with each weight vector.
Evaluator = Callable[[tuple[tuple[float, ...], ...]], Sequence[float]]


def decide(
    rule: Rule, *, steps: Sequence[int], losses: Sequence[float], evaluate: Evaluator
) -> Weights:
    """Ask the rule until it answers with weights, measuring what it wants to know.

    ``steps`` and ``losses`` (target loss on selection, nats) are of the window's checkpoints,
    oldest first. Raises RuleError if the rule asks the same again or never answers.
    """
    seen = Observation(tuple(steps), np.asarray(losses, dtype=np.float64))
    for _ in range(MAX_ROUNDS):
        answer = rule(seen)
        if isinstance(answer, Weights):
            return answer
        seen = _measured(seen, answer, evaluate)
    raise RuleError(f"the rule asked for evaluations {MAX_ROUNDS} times without an answer")


def _measured(seen: Observation, question: Evaluate, evaluate: Evaluator) -> Observation:
    known = {merge.weights for merge in seen.merges}
    fresh = tuple(vector for vector in question.vectors if vector not in known)
    if not fresh:
        raise RuleError("the rule asked only for merges that it has already seen")
    merges = [
        EvaluatedMerge(vector, float(loss))
        for vector, loss in zip(fresh, evaluate(fresh), strict=True)
    ]
    return Observation(seen.steps, seen.losses, (*seen.merges, *merges))
