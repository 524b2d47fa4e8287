"""Weight rules: formulas, the simplex, and the closed form of `calibrated` against a search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ckptfuse.deciding import decide
from ckptfuse.errors import RuleError
from ckptfuse.rules import (
    Evaluate,
    EvaluatedMerge,
    Observation,
    Weights,
    get_rule,
    project_to_simplex,
)

LOSSES = st.lists(st.floats(0.5, 12), min_size=1, max_size=12)


def observed(losses: list[float], *merges: EvaluatedMerge) -> Observation:
    steps = tuple(range(100, 100 * len(losses) + 1, 100))
    return Observation(steps, np.asarray(losses), merges)


def weights_of(name: str, losses: list[float], **options: float) -> np.ndarray:
    answer = get_rule(name, options)(observed(losses))
    assert isinstance(answer, Weights)
    return np.asarray(answer.weights)


def calibrated(losses: list[float], *, energy: float) -> Weights:
    """The rule's answer where merges behave as its model says, with this noise energy."""

    def measure(vectors: tuple[tuple[float, ...], ...]) -> list[float]:
        return [
            float(np.dot(v, losses) - energy * (1 - np.dot(v, v))) for v in map(np.asarray, vectors)
        ]

    return decide(
        get_rule("calibrated"), steps=list(range(len(losses))), losses=losses, evaluate=measure
    )


def test_latest_takes_the_newest_and_best_the_lowest_loss() -> None:
    assert weights_of("latest", [2.0, 1.0, 3.0]).tolist() == [0, 0, 1]
    assert weights_of("best", [2.0, 1.0, 3.0]).tolist() == [0, 1, 0]


def test_uniform_is_uniform() -> None:
    assert weights_of("uniform", [2.0, 1.0, 3.0, 9.0]).tolist() == [0.25] * 4


def test_inverse_perplexity_is_proportional_to_a_power_of_perplexity() -> None:
    perplexities = np.exp([2.0, 2.5, 3.0])
    expected = perplexities**-2.0 / (perplexities**-2.0).sum()
    assert weights_of("inverse-perplexity", [2.0, 2.5, 3.0], p=2.0) == pytest.approx(expected)


def test_softmax_with_tau_is_inverse_perplexity_with_one_over_tau() -> None:
    losses = [3.1, 3.0, 3.05]
    assert weights_of("softmax", losses, tau=0.25) == pytest.approx(
        weights_of("inverse-perplexity", losses, p=4.0)
    )


@pytest.mark.parametrize("name", ["latest", "best", "uniform", "inverse-perplexity", "softmax"])
@given(losses=LOSSES)
@settings(max_examples=30, deadline=None)
def test_weights_lie_on_the_simplex(name: str, losses: list[float]) -> None:
    weights = weights_of(name, losses)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= 0).all()


def test_calibrated_on_two_checkpoints_is_what_one_works_out_by_hand() -> None:
    """w = 1/2 + (l_2 - l_1) / 4e on the first: 1/2 + 0.1 / 0.4."""
    assert calibrated([2.0, 2.1], energy=0.1).weights == pytest.approx([0.75, 0.25])


@given(losses=st.lists(st.floats(2, 3), min_size=3, max_size=3), energy=st.floats(0.01, 1))
@settings(max_examples=30, deadline=None)
def test_no_point_of_a_grid_over_the_simplex_is_better(losses: list[float], energy: float) -> None:
    steps = np.linspace(0, 1, 21)
    grid = [np.array([a, b, 1 - a - b]) for a in steps for b in steps if a + b <= 1]
    ours = np.asarray(calibrated(losses, energy=energy).weights)
    least = min(float(w @ losses + energy * w @ w) for w in grid)
    assert ours @ losses + energy * ours @ ours <= least + 1e-9


@given(losses=LOSSES, energy=st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_calibrated_weights_lie_on_the_simplex(losses: list[float], energy: float) -> None:
    weights = np.asarray(calibrated(losses, energy=energy).weights)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= 0).all()


@given(losses=st.lists(st.floats(2, 3), min_size=2, max_size=6), energy=st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_calibrated_finds_the_minimum_that_a_numerical_search_finds(
    losses: list[float], energy: float
) -> None:
    count = len(losses)

    def objective(w: np.ndarray) -> float:
        return float(w @ losses + energy * w @ w)

    found = minimize(
        objective,
        np.full(count, 1 / count),
        jac=lambda w: np.asarray(losses) + 2 * energy * w,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        options={"ftol": 1e-12},
        method="SLSQP",
    )
    ours = np.asarray(calibrated(losses, energy=energy).weights)
    assert objective(ours) <= found.fun + 1e-7


def test_calibrated_asks_for_one_merge_before_it_answers() -> None:
    question = get_rule("calibrated")(observed([2.0, 2.1, 2.05]))
    assert question == Evaluate(((1 / 3, 1 / 3, 1 / 3),))


def test_calibrated_measures_the_noise_energy_and_predicts_the_loss_of_its_merge() -> None:
    answer = calibrated([2.0, 2.1, 2.05], energy=0.3)
    weights = np.asarray(answer.weights)
    assert answer.notes["noise_energy"] == pytest.approx(0.3)
    assert answer.notes["predicted_loss"] == pytest.approx(
        weights @ [2.0, 2.1, 2.05] - 0.3 * (1 - weights @ weights)
    )


def test_calibrated_is_nearly_uniform_when_noise_exceeds_the_spread() -> None:
    assert calibrated([2.0, 2.001, 2.002], energy=5.0).weights == pytest.approx(
        [1 / 3] * 3, abs=1e-3
    )


@pytest.mark.parametrize("energy", [0.0, -0.5])
def test_calibrated_takes_the_best_when_averaging_gains_nothing(energy: float) -> None:
    assert calibrated([2.2, 2.1, 2.0], energy=energy).weights == (0, 0, 1)


def test_calibrated_leaves_a_damaged_checkpoint_out_and_does_not_let_it_inflate_the_noise() -> None:
    answer = calibrated([2.0, 2.02, 9.0, 2.01], energy=0.2)
    assert answer.weights[2] == 0
    assert answer.notes["noise_energy"] == pytest.approx(0.2)


def test_calibrated_measures_the_noise_on_healthy_checkpoints_alone() -> None:
    question = get_rule("calibrated")(observed([2.0, 2.02, 9.0, 2.01]))
    assert question == Evaluate(((1 / 3, 1 / 3, 0.0, 1 / 3),))


@given(losses=st.lists(st.floats(0.5, 12), min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_calibrated_never_asks_for_a_single_checkpoint(losses: list[float]) -> None:
    question = get_rule("calibrated")(observed(losses))
    assert isinstance(question, Evaluate)
    assert sum(weight > 0 for weight in question.vectors[0]) >= 2


def test_a_window_of_one_needs_no_merge() -> None:
    assert get_rule("calibrated")(observed([2.0])) == Weights((1.0,))


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=10))
@settings(max_examples=60, deadline=None)
def test_projection_to_the_simplex_is_no_farther_than_any_corner_or_the_centre(
    point: list[float],
) -> None:
    target = np.asarray(point)
    projected = project_to_simplex(target)
    others = [*np.eye(len(point)), np.full(len(point), 1 / len(point))]
    distance = np.linalg.norm(projected - target)
    assert all(distance <= np.linalg.norm(other - target) + 1e-9 for other in others)


def test_an_unknown_rule_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RuleError, match=r"'greedyy' is unknown; there are best, calibrated"):
        get_rule("greedyy")


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(RuleError, match=r"no option 'temperature'; it takes tau"):
        get_rule("softmax", {"temperature": 1.0})


def test_a_rule_without_options_says_so() -> None:
    with pytest.raises(RuleError, match=r"no option 'tau'; it takes no options"):
        get_rule("uniform", {"tau": 1.0})


def test_an_option_that_means_nothing_is_refused() -> None:
    with pytest.raises(RuleError, match="tau is 0"):
        get_rule("softmax", {"tau": 0})(observed([1.0, 2.0]))
