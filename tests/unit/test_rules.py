"""Weight rules that need no measured merge, and how rules are found, configured and held to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ckptfuse.errors import ConfigurationError, RuleError
from ckptfuse.rules import Observation, Weights, get_rule
from ckptfuse.rules.simplex import least_on_simplex

LOSSES = st.lists(st.floats(0.5, 12), min_size=1, max_size=12)
#: Losses that overflow or vanish where arithmetic is careless.
EXTREME = st.one_of(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=9),
    st.lists(st.integers(0, 9), min_size=1, max_size=9).map(lambda n: [3 + 1e-12 * i for i in n]),
    st.integers(1, 9).map(lambda count: [2.5] * count),
)
FREE = ["latest", "best", "uniform", "linear", "ema", "minus-sqrt", "inverse-perplexity", "softmax"]


def weights_of(name: str, losses: Sequence[float], **options: Any) -> np.ndarray:
    answer = get_rule(name, options)(Observation.of(losses))
    assert isinstance(answer, Weights)
    return np.asarray(answer.weights)


# -- formulas ----------------------------------------------------------------------------------


def test_latest_takes_the_newest_and_best_the_lowest_loss() -> None:
    assert weights_of("latest", [2.0, 1.0, 3.0]).tolist() == [0, 0, 1]
    assert weights_of("best", [2.0, 1.0, 3.0]).tolist() == [0, 1, 0]


def test_best_takes_the_newest_of_equals() -> None:
    assert weights_of("best", [1.0, 1.0, 3.0]).tolist() == [0, 1, 0]


def test_uniform_is_uniform() -> None:
    assert weights_of("uniform", [2.0, 1.0, 3.0, 9.0]).tolist() == [0.25] * 4


def test_linear_grows_with_the_position() -> None:
    assert weights_of("linear", [1.0] * 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_ema_falls_by_the_same_factor_with_every_checkpoint_of_age() -> None:
    weights = weights_of("ema", [1.0] * 5, alpha=0.3)
    assert weights[:-1] / weights[1:] == pytest.approx([0.7] * 4)
    assert weights_of("ema", [1.0] * 5, alpha=1.0).tolist() == [0, 0, 0, 0, 1]


def test_minus_sqrt_has_the_published_weights_of_ten() -> None:
    weights = weights_of("minus-sqrt", [1.0] * 10)
    assert weights[[0, 1, 2, 9]] == pytest.approx([0.316, 0.131, 0.101, 0.051], abs=5e-4)


@given(count=st.integers(2, 30))
def test_minus_sqrt_is_what_its_learning_rates_say(count: int) -> None:
    """c_0 = 1 - v_1, c_j = v_j - v_(j+1), c_(K-1) = v_(K-1), with v_j = 1 - sqrt(j / K)."""
    v = 1 - np.sqrt(np.arange(1, count) / count)
    expected = [1 - v[0], *(v[:-1] - v[1:]), v[-1]]
    assert weights_of("minus-sqrt", [1.0] * count) == pytest.approx(expected)


def test_inverse_perplexity_is_proportional_to_a_power_of_perplexity() -> None:
    perplexities = np.exp([2.0, 2.5, 3.0])
    expected = perplexities**-2.0 / (perplexities**-2.0).sum()
    assert weights_of("inverse-perplexity", [2.0, 2.5, 3.0], p=2.0) == pytest.approx(expected)


def test_softmax_with_tau_is_inverse_perplexity_with_one_over_tau() -> None:
    losses = [3.1, 3.0, 3.05]
    assert weights_of("softmax", losses, tau=0.25) == pytest.approx(
        weights_of("inverse-perplexity", losses, p=4.0)
    )


# -- properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FREE)
@given(losses=EXTREME)
@settings(max_examples=40, deadline=None)
def test_weights_lie_on_the_simplex_whatever_the_losses(name: str, losses: list[float]) -> None:
    weights = weights_of(name, losses)
    assert weights.shape == (len(losses),)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= 0).all()


@pytest.mark.parametrize("name", ["inverse-perplexity", "softmax"])
@given(losses=LOSSES, random=st.randoms())
@settings(max_examples=40, deadline=None)
def test_rules_of_losses_alone_follow_a_permutation_of_the_checkpoints(
    name: str, losses: list[float], random: Any
) -> None:
    order = list(range(len(losses)))
    random.shuffle(order)
    shuffled = weights_of(name, [losses[i] for i in order])
    assert shuffled == pytest.approx(weights_of(name, losses)[order], abs=1e-12)


@pytest.mark.parametrize("name", ["latest", "uniform", "linear", "ema", "minus-sqrt"])
@given(losses=LOSSES)
@settings(max_examples=20, deadline=None)
def test_schedules_do_not_look_at_losses(name: str, losses: list[float]) -> None:
    assert (weights_of(name, losses) == weights_of(name, [1.0] * len(losses))).all()


@pytest.mark.parametrize("name", ["inverse-perplexity", "softmax"])
@given(losses=LOSSES)
@settings(max_examples=40, deadline=None)
def test_a_lower_loss_never_has_less_weight(name: str, losses: list[float]) -> None:
    by_loss = weights_of(name, losses)[np.argsort(losses)]
    assert (np.diff(by_loss) <= 1e-15).all()


def test_softmax_goes_from_best_to_uniform_as_its_temperature_rises() -> None:
    losses = [2.0, 2.3, 2.1]
    assert weights_of("softmax", losses, tau=1e-300) == pytest.approx([1, 0, 0])
    assert weights_of("softmax", losses, tau=1e9) == pytest.approx([1 / 3] * 3)


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(0.01, 10)), min_size=1, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_the_least_on_the_simplex_is_not_above_what_a_solver_finds(
    terms: list[tuple[float, float]],
) -> None:
    linear, curvature = np.array(terms).T
    count = len(terms)

    def objective(w: np.ndarray) -> float:
        return float(linear @ w + curvature @ w**2)

    found = minimize(
        objective,
        np.full(count, 1 / count),
        jac=lambda w: linear + 2 * curvature * w,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        options={"ftol": 1e-14, "maxiter": 500},
        method="SLSQP",
    )
    ours = least_on_simplex(linear, curvature)
    assert ours.sum() == pytest.approx(1)
    assert (ours >= 0).all()
    assert objective(ours) <= found.fun + 1e-6


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_a_point_of_the_simplex_is_the_nearest_to_itself(point: list[float]) -> None:
    """|w - p|^2 is least where -2 p w + w^2 is."""
    inside = np.asarray(point) / sum(point)
    assert least_on_simplex(-2 * inside, np.ones(len(inside))) == pytest.approx(inside)


# -- the registry ------------------------------------------------------------------------------


def test_an_unknown_rule_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RuleError, match=r"'greedyy' is unknown; there are auto, bayes, best"):
        get_rule("greedyy")


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(RuleError, match=r"no option 'temperature'; it takes tau"):
        get_rule("softmax", {"temperature": 1.0})


def test_a_rule_without_options_says_so() -> None:
    with pytest.raises(RuleError, match=r"no option 'tau'; it takes no options"):
        get_rule("uniform", {"tau": 1.0})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("softmax", {"tau": 0}, "option tau is 0: .* greater than 0"),
        ("softmax", {"tau": "hot"}, "option tau is 'hot'"),
        ("inverse-perplexity", {"p": float("nan")}, "option p is nan"),
        ("ema", {"alpha": 2}, "option alpha is 2: .* less than or equal to 1"),
        ("bayes", {"evaluations": 2.5}, r"option evaluations is 2\.5"),
        ("bayes", {"space": "box"}, "option space is 'box'.*'pairwise'"),
        ("auto", {"candidates": []}, "option candidates"),
        ("auto", {"candidates": [{"name": "softmax"}]}, r"candidates\.0\.rule"),
    ],
)
def test_an_option_that_means_nothing_is_refused_before_any_work(
    name: str, options: dict[str, object], said: str
) -> None:
    with pytest.raises(RuleError, match=f"(?s)rule '{name}': .*{said}"):
        get_rule(name, options)


EXAMPLE = "examples.recency_and_quality:recency_and_quality"


def test_a_rule_of_ones_own_is_named_by_where_it_can_be_imported() -> None:
    weights = weights_of(EXAMPLE, [2.0, 2.0, 2.0], half_life=1)
    assert weights == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    with pytest.raises(RuleError, match="no option 'p'; it takes tau, half_life"):
        get_rule(EXAMPLE, {"p": 1})
    with pytest.raises(RuleError, match="option tau is 'hot'"):
        get_rule(EXAMPLE, {"tau": "hot"})


@pytest.mark.parametrize("name", ["no.such.module:rule", "examples.recency_and_quality:nothing"])
def test_a_rule_that_cannot_be_imported_is_told(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"rule\.name '{name}': .*PYTHONPATH"):
        get_rule(name)
