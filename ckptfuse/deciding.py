"""From what was measured of a window to its weights: the rounds between a rule and evaluations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckptfuse.errors import RuleError
from ckptfuse.rules import Evaluate, EvaluatedMerge, Measurement, Observation, Rule, Weights

MAX_ROUNDS = 64

Vectors = tuple[tuple[float, ...], ...]
#: Measures the merge with each weight vector on selection text.
Evaluator = Callable[[Vectors], Sequence[Measurement]]
#: What is known already of the merge with these weights, if anything.
Recall = Callable[[tuple[float, ...]], Measurement | None]


def _knows_nothing(weights: tuple[float, ...]) -> None:
    return None


@dataclass(frozen=True, eq=False)
class Decision:
    """The rule's answer, and all that it had seen when it gave it."""

    answer: Weights
    seen: Observation

    @property
    def is_final(self) -> bool:
        """Whether the merge with these weights was measured, so that nothing is left to learn."""
        return self.seen.measured(self.answer.weights) is not None


def decide(
    rule: Rule, seen: Observation, *, evaluate: Evaluator, recall: Recall = _knows_nothing
) -> Decision:
    """Ask the rule until it answers with weights, measuring what it wants to know.

    If ``recall`` knows the merge with these weights, the rule is asked again with that measured
    too: it may then check itself and answer otherwise. Raises RuleError if it asks the same again
    or comes to no end.
    """
    for _ in range(MAX_ROUNDS):
        answer = rule(seen)
        if isinstance(answer, Evaluate):
            seen = _measured(seen, answer, evaluate)
            continue
        known = None if seen.measured(answer.weights) else recall(answer.weights)
        if known is None:
            return Decision(answer, seen)
        seen = seen.having([EvaluatedMerge(answer.weights, known)])
    raise RuleError(f"the rule asked for evaluations {MAX_ROUNDS} times without an answer")


def _measured(seen: Observation, question: Evaluate, evaluate: Evaluator) -> Observation:
    fresh = tuple(v for v in dict.fromkeys(question.vectors) if seen.measured(v) is None)
    if not fresh:
        raise RuleError("the rule asked only for merges that it has already seen")
    found = evaluate(fresh)
    return seen.having([EvaluatedMerge(v, m) for v, m in zip(fresh, found, strict=True)])
