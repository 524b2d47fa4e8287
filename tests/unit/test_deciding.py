"""The rounds between a rule and the merges that it wants measured."""

from collections.abc import Sequence

import pytest

from ckptfuse.deciding import MAX_ROUNDS, Decision, decide
from ckptfuse.errors import RuleError
from ckptfuse.rules import Evaluate, Measurement, Observation, Rule, Weights, get_rule, rule

HALVES = ((0.75, 0.25), (0.25, 0.75))
Vectors = tuple[tuple[float, ...], ...]


def decided(chosen: Rule, asked: list[Vectors] | None = None) -> Weights:
    def evaluate(vectors: Vectors) -> Sequence[Measurement]:
        if asked is not None:
            asked.append(vectors)
        return [Measurement(vector[0]) for vector in vectors]

    return decide(chosen, Observation.of([2.0, 2.1]), evaluate=evaluate).answer


def test_a_rule_that_knows_its_answer_has_nothing_measured() -> None:
    asked: list[Vectors] = []
    assert decided(get_rule("uniform"), asked).weights == (0.5, 0.5)
    assert asked == []


def test_a_rule_sees_the_losses_of_all_merges_that_it_asked_for() -> None:
    def curious(seen: Observation) -> Evaluate | Weights:
        if len(seen.merges) < 2:
            return Evaluate(HALVES[: len(seen.merges) + 1])
        best = min(seen.merges, key=lambda merge: merge.loss)
        return Weights(best.weights, notes={"loss": best.loss})

    asked: list[Vectors] = []
    assert decided(curious, asked) == Weights((0.25, 0.75), notes={"loss": 0.25})
    assert asked == [HALVES[:1], HALVES[1:]], "what is known is not measured again"


def test_a_rule_that_asks_for_what_it_knows_is_stopped() -> None:
    with pytest.raises(RuleError, match="already seen"):
        decided(lambda seen: Evaluate(HALVES))


def test_what_is_known_of_a_single_checkpoint_is_never_measured() -> None:
    def asks_for_a_corner(seen: Observation) -> Evaluate:
        return Evaluate(((1.0, 0.0),))

    with pytest.raises(RuleError, match="already seen"):
        decided(asks_for_a_corner)


def test_a_merge_that_is_asked_for_twice_at_once_is_measured_once() -> None:
    def twice(seen: Observation) -> Evaluate | Weights:
        return Weights(HALVES[0]) if seen.merges else Evaluate((HALVES[0], HALVES[0]))

    asked: list[Vectors] = []
    decided(twice, asked)
    assert asked == [HALVES[:1]]


def test_a_rule_is_asked_again_once_its_own_merge_is_known_and_may_answer_otherwise() -> None:
    def changes_its_mind(seen: Observation) -> Weights:
        loss = seen.measured(HALVES[0])
        return Weights(HALVES[1] if loss is not None and loss.loss > 2 else HALVES[0])

    def decided_with(loss: float) -> Decision:
        known = {HALVES[0]: Measurement(loss)}
        seen = Observation.of([2.0, 2.1])
        return decide(changes_its_mind, seen, evaluate=lambda v: [], recall=known.get)

    assert decided_with(1.9).answer.weights == HALVES[0]
    assert decided_with(1.9).is_final
    assert decided_with(2.5).answer.weights == HALVES[1]
    assert not decided_with(2.5).is_final, "its new merge has not been measured"


def test_a_rule_that_never_answers_is_stopped() -> None:
    def endless(seen: Observation) -> Evaluate:
        share = 1 / (2 + len(seen.merges))
        return Evaluate(((share, 1 - share),))

    with pytest.raises(RuleError, match=f"{MAX_ROUNDS} times without an answer"):
        decided(endless)


@pytest.mark.parametrize(
    "vector", [(0.5,), (0.6, 0.6), (1.5, -0.5), (float("nan"), 1.0), (0.0, 0.0)]
)
@pytest.mark.parametrize("kind", ["question", "answer"])
def test_a_new_rule_that_leaves_the_simplex_is_told_by_its_name(
    vector: tuple[float, ...], kind: str
) -> None:
    @rule("of a researcher")
    def astray(seen: Observation) -> Evaluate | Weights:
        return Evaluate((vector,)) if kind == "question" else Weights(vector)

    with pytest.raises(RuleError, match=r"'of a researcher' answered .*: 2 weights"):
        decided(get_rule("of a researcher"))
