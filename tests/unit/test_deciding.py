"""The rounds between a rule and the merges that it wants measured."""

from collections.abc import Sequence

import pytest

from ckptfuse.deciding import MAX_ROUNDS, decide
from ckptfuse.errors import RuleError
from ckptfuse.rules import Evaluate, Observation, Rule, Weights, get_rule, rule

CORNERS = ((1.0, 0.0), (0.0, 1.0))
Vectors = tuple[tuple[float, ...], ...]


def decided(chosen: Rule, asked: list[Vectors] | None = None) -> Weights:
    def evaluate(vectors: Vectors) -> Sequence[float]:
        if asked is not None:
            asked.append(vectors)
        return [vector[0] for vector in vectors]

    return decide(chosen, steps=[100, 200], losses=[2.0, 2.1], evaluate=evaluate)


def test_a_rule_that_knows_its_answer_has_nothing_measured() -> None:
    asked: list[Vectors] = []
    assert decided(get_rule("uniform"), asked).weights == (0.5, 0.5)
    assert asked == []


def test_a_rule_sees_the_losses_of_all_merges_that_it_asked_for() -> None:
    def curious(seen: Observation) -> Evaluate | Weights:
        if len(seen.merges) < 2:
            return Evaluate(CORNERS[: len(seen.merges) + 1])
        best = min(seen.merges, key=lambda merge: merge.loss)
        return Weights(best.weights, {"loss": best.loss})

    asked: list[Vectors] = []
    assert decided(curious, asked) == Weights((0.0, 1.0), {"loss": 0.0})
    assert asked == [CORNERS[:1], CORNERS[1:]], "what is known is not measured again"


def test_a_rule_that_asks_for_what_it_knows_is_stopped() -> None:
    with pytest.raises(RuleError, match="already seen"):
        decided(lambda seen: Evaluate(CORNERS))


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
