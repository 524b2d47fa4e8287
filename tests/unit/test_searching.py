"""Rules that search for weights, on losses whose minimum is known."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfuse.deciding import Decision, decide
from ckptfuse.rules import Measurement, Observation, get_rule
from ckptfuse.rules.gaussian_process import expected_improvement, fit


class Bowl:
    """L(w) = w . l - e (1 - sum w^2), counting what is asked."""

    def __init__(self, losses: Sequence[float], energy: float) -> None:
        self.losses, self.energy = np.asarray(losses), energy
        self.rounds: list[int] = []
        self.asked: list[tuple[float, ...]] = []

    def loss(self, w: Sequence[float] | np.ndarray) -> float:
        return float(np.dot(w, self.losses)) - self.energy * float(1 - np.dot(w, w))

    def decide(self, name: str, **options: object) -> Decision:
        def evaluate(vectors: Sequence[tuple[float, ...]]) -> list[Measurement]:
            self.rounds.append(len(vectors))
            self.asked.extend(vectors)
            return [Measurement(self.loss(vector)) for vector in vectors]

        seen = Observation.of(self.losses.tolist())
        return decide(get_rule(name, options), seen, evaluate=evaluate)


# -- greedy ------------------------------------------------------------------------------------


def test_greedy_keeps_what_helps_and_leaves_what_does_not() -> None:
    bowl = Bowl([2.05, 2.0, 3.0, 2.02], energy=0.3)
    assert bowl.decide("greedy").answer.weights == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])


@given(losses=st.lists(st.floats(2, 3), min_size=1, max_size=8), energy=st.floats(-0.5, 0.5))
@settings(max_examples=40, deadline=None)
def test_greedy_costs_one_merge_a_checkpoint_and_is_never_worse_than_the_best(
    losses: list[float], energy: float
) -> None:
    bowl = Bowl(losses, energy)
    weights = np.asarray(bowl.decide("greedy").answer.weights)
    assert bowl.rounds == [1] * (len(losses) - 1)
    assert bowl.loss(weights) <= min(losses) + 1e-12
    kept = weights[weights > 0]
    assert kept == pytest.approx(np.full(len(kept), 1 / len(kept)))


# -- bayes -------------------------------------------------------------------------------------

DRIFT = [2.30, 2.22, 2.15, 2.09, 2.04, 2.00]


def test_bayes_finds_nearly_the_minimum_within_its_evaluations() -> None:
    bowl = Bowl(DRIFT, energy=0.2)
    found = bowl.decide("bayes", evaluations=18).answer
    least = bowl.loss(Bowl(DRIFT, 0.2).decide("calibrated").answer.weights)
    assert bowl.loss(found.weights) - least < 0.003
    assert bowl.loss(found.weights) < bowl.loss([1 / 6] * 6) - 0.01, "uniform was its first guess"


@pytest.mark.parametrize("space", ["simplex", "pairwise"])
@pytest.mark.parametrize("evaluations", [1, 4, 7])
def test_bayes_keeps_to_its_evaluations_and_repeats_itself(space: str, evaluations: int) -> None:
    first, second = Bowl(DRIFT, 0.2), Bowl(DRIFT, 0.2)
    options = {"space": space, "evaluations": evaluations}
    answer = first.decide("bayes", **options).answer
    assert sum(first.rounds) <= evaluations
    assert max(first.rounds) <= 3
    assert second.decide("bayes", **options).answer == answer
    assert first.asked == second.asked


def test_bayes_by_pairs_draws_from_the_two_newest_alone() -> None:
    bowl = Bowl(DRIFT, energy=0.1)
    found = np.asarray(bowl.decide("bayes", space="pairwise").answer.weights)
    assert found[:-2].tolist() == [0, 0, 0, 0]
    # w = 1/2 + (l_5 - l_6) / 4e on the newest: 0.6
    assert found[-1] == pytest.approx(0.6, abs=0.1)


def test_bayes_gives_a_damaged_checkpoint_nothing() -> None:
    bowl = Bowl([2.1, 9.0, 2.05, 2.0], energy=0.2)
    bowl.decide("bayes")
    assert all(vector[1] == 0 for vector in bowl.asked)


@given(losses=st.one_of(st.lists(st.floats(0, 1e3), min_size=1, max_size=5),
                        st.integers(1, 5).map(lambda count: [2.5] * count)),
       energy=st.floats(-1, 1))  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_bayes_is_never_worse_than_the_best_single_whatever_the_losses(
    losses: list[float], energy: float
) -> None:
    bowl = Bowl(losses, energy)
    weights = np.asarray(bowl.decide("bayes", evaluations=4).answer.weights)
    assert weights.sum() == pytest.approx(1)
    assert bowl.loss(weights) <= min(losses) + 1e-9


def test_a_gaussian_process_goes_through_its_data_and_is_unsure_elsewhere() -> None:
    x = np.linspace(0, 1, 6)[:, None]
    y = np.sin(3 * x[:, 0])
    process = fit(x, y)
    mean, error = process.predict(x)
    assert mean == pytest.approx(y, abs=1e-3)
    assert error.max() < 2e-3
    between, unsure = process.predict(np.array([[0.5], [3.0]]))
    assert between[0] == pytest.approx(np.sin(1.5), abs=0.01)
    assert unsure[1] > 10 * unsure[0]


def test_expected_improvement_is_the_mean_of_what_is_won() -> None:
    draws = np.random.default_rng(0).normal(2.0, 0.5, 200_000)
    won = np.maximum(1.8 - draws, 0).mean()
    found = expected_improvement(np.array([2.0]), np.array([0.5]), lowest=1.8)
    assert found[0] == pytest.approx(won, rel=0.01)


# -- auto --------------------------------------------------------------------------------------


def candidates(*names: str) -> list[dict[str, object]]:
    return [{"rule": name} for name in names]


def test_auto_takes_the_candidate_that_measures_lowest() -> None:
    bowl = Bowl(DRIFT, energy=0.2)
    found = bowl.decide("auto", candidates=candidates("latest", "uniform", "calibrated"))
    assert found.answer.weights == Bowl(DRIFT, 0.2).decide("calibrated").answer.weights
    assert found.answer.remarks[0] == "chosen: calibrated"


def test_auto_measures_the_questions_of_all_candidates_together() -> None:
    bowl = Bowl(DRIFT, energy=0.2)
    bowl.decide("auto", candidates=[*candidates("uniform", "calibrated"),
                                    {"rule": "calibrated", "last": 4}])  # fmt: skip
    assert bowl.rounds == [2, 2], "two probes, of which one is uniform; then two answers"


def test_auto_gives_members_outside_a_candidates_window_no_weight() -> None:
    bowl = Bowl(DRIFT, energy=0.05)
    found = bowl.decide("auto", candidates=[{"rule": "uniform", "last": 2}, {"rule": "uniform"}])
    assert found.answer.weights == (0, 0, 0, 0, 0.5, 0.5)
    assert found.answer.remarks[0] == "chosen: uniform over the newest 2"


@pytest.mark.parametrize(("spread", "chosen"), [(0.01, "uniform"), (0.0001, "linear")])
def test_auto_prefers_the_simpler_within_two_paired_standard_errors(
    spread: float, chosen: str
) -> None:
    """Linear measures 0.005 lower; whether that counts depends on the text."""
    draw = np.random.default_rng(0)

    def measured(vectors: Sequence[tuple[float, ...]]) -> list[Measurement]:
        losses = [2.0 if len(set(vector)) == 1 else 1.995 for vector in vectors]
        return [Measurement(loss, loss + draw.normal(0, spread, 200)) for loss in losses]

    rule = get_rule("auto", {"candidates": candidates("uniform", "linear")})
    answer = decide(rule, Observation.of([2.1, 2.1, 2.1]), evaluate=measured).answer
    assert answer.remarks[0] == f"chosen: {chosen}"


def test_the_usual_candidates_of_auto_come_to_an_answer() -> None:
    bowl = Bowl(DRIFT, energy=0.2)
    assert bowl.loss(bowl.decide("auto").answer.weights) < bowl.loss([1 / 6] * 6)
