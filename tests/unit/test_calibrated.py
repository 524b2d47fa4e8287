"""`calibrated`: its closed form against a search, its limits, and the checks that it makes."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ckptfuse.deciding import Decision, decide
from ckptfuse.losses import Losses
from ckptfuse.resampling import measure
from ckptfuse.rules import Evaluate, Measurement, Observation, Weights, get_rule
from ckptfuse.rules.energy import Energy, LossModel, energy_of

RULE = get_rule("calibrated")
Measure = Callable[[np.ndarray], Measurement]


def settled(seen: Observation, measured: Measure, *, review: bool = False) -> Decision:
    """The rule's decision where merges measure as told; ``review`` its own weights' too."""
    return decide(
        RULE,
        seen,
        evaluate=lambda vectors: [measured(np.asarray(v)) for v in vectors],
        recall=lambda vector: measured(np.asarray(vector)) if review else None,
    )


def calibrated(losses: Sequence[float], *, energy: float) -> Weights:
    """The answer where merges behave as the model says, with this noise energy."""

    def measured(w: np.ndarray) -> Measurement:
        return Measurement(float(w @ np.asarray(losses) - energy * (1 - w @ w)))

    return settled(Observation.of(losses), measured).answer


def objective(w: np.ndarray, losses: Sequence[float], energy: float) -> float:
    return float(w @ np.asarray(losses) + energy * w @ w)


# -- the formula -------------------------------------------------------------------------------


def test_on_two_checkpoints_it_is_what_one_works_out_by_hand() -> None:
    """w = 1/2 + (l_2 - l_1) / 4e on the first: 1/2 + 0.1 / 0.4."""
    assert calibrated([2.0, 2.1], energy=0.1).weights == pytest.approx([0.75, 0.25])


@given(losses=st.lists(st.floats(2, 2.1), min_size=2, max_size=6), energy=st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_it_finds_the_minimum_that_a_numerical_search_finds(
    losses: list[float], energy: float
) -> None:
    count = len(losses)
    found = minimize(
        lambda w: objective(w, losses, energy),
        np.full(count, 1 / count),
        jac=lambda w: np.asarray(losses) + 2 * energy * w,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        options={"ftol": 1e-12},
        method="SLSQP",
    )
    ours = np.asarray(calibrated(losses, energy=energy).weights)
    assert objective(ours, losses, energy) <= found.fun + 1e-7


@given(
    losses=st.lists(st.floats(2, 2.1), min_size=2, max_size=8),
    energy=st.floats(0.01, 1),
    random=st.randoms(),
)
@settings(max_examples=40, deadline=None)
def test_it_follows_a_permutation_of_the_checkpoints(
    losses: list[float], energy: float, random: object
) -> None:
    order = list(range(len(losses)))
    random.shuffle(order)  # type: ignore[attr-defined]
    usual = np.asarray(calibrated(losses, energy=energy).weights)
    shuffled = calibrated([losses[i] for i in order], energy=energy).weights
    assert shuffled == pytest.approx(usual[order], abs=1e-6)


@given(
    losses=st.one_of(
        st.lists(st.floats(0, 1e3), min_size=1, max_size=9),
        st.lists(st.integers(0, 9), min_size=1, max_size=9).map(
            lambda n: [1e3 + 1e-12 * i for i in n]
        ),
        st.integers(1, 9).map(lambda count: [2.5] * count),
    ),
    energy=st.one_of(st.just(0.0), st.floats(-1, 1e3)),
)
@settings(max_examples=100, deadline=None)
def test_its_weights_lie_on_the_simplex_whatever_the_losses(
    losses: list[float], energy: float
) -> None:
    answer = calibrated(losses, energy=energy)
    weights = np.asarray(answer.weights)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= 0).all()
    assert np.isfinite(list(answer.notes.values())).all()


def test_with_more_and_more_noise_it_becomes_uniform() -> None:
    weights = calibrated([2.0, 2.01, 2.02], energy=1e6).weights
    assert weights == pytest.approx([1 / 3] * 3, abs=1e-7)


def test_with_less_and_less_noise_it_becomes_best() -> None:
    assert calibrated([2.2, 2.0, 2.1], energy=2e-4).weights == (0, 1, 0)


def test_a_window_of_one_needs_no_merge() -> None:
    assert RULE(Observation.of([2.0])) == Weights((1.0,))


# -- the probe ---------------------------------------------------------------------------------


def test_it_asks_for_the_uniform_merge_before_it_answers() -> None:
    assert RULE(Observation.of([2.0, 2.1, 2.05])) == Evaluate(((1 / 3, 1 / 3, 1 / 3),))


def test_it_measures_the_noise_energy_and_predicts_the_loss_of_its_merge() -> None:
    answer = calibrated([2.0, 2.1, 2.05], energy=0.3)
    weights = np.asarray(answer.weights)
    expected = objective(weights, [2.0, 2.1, 2.05], 0.3) - 0.3
    assert answer.notes["noise_energy"] == pytest.approx(0.3)
    assert answer.notes["predicted_loss"] == pytest.approx(expected)
    assert answer.predicted[answer.weights].loss == pytest.approx(expected)


def test_a_damaged_checkpoint_has_no_weight_and_no_part_in_the_noise() -> None:
    losses = [2.0, 2.02, 9.0, 2.01]
    assert RULE(Observation.of(losses)) == Evaluate(((1 / 3, 1 / 3, 0.0, 1 / 3),))
    answer = calibrated(losses, energy=0.2)
    assert answer.weights[2] == 0
    assert answer.notes["noise_energy"] == pytest.approx(0.2)
    assert "step 3 has no part in the noise energy" in answer.remarks[0]


@given(losses=st.lists(st.floats(0.5, 12), min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_it_never_asks_for_a_single_checkpoint(losses: list[float]) -> None:
    question = RULE(Observation.of(losses))
    assert isinstance(question, Evaluate)
    assert sum(weight > 0 for weight in question.vectors[0]) >= 2


# -- a text of documents -----------------------------------------------------------------------


class World:
    """A quadratic loss of known Hessian, checkpoints around a slow path, and a text of documents.

    Document g's loss at x is c_g + b_g . x + x' H_g x / 2, with H_g around the diagonal Hessian.
    Of all documents that there could be, the mean loss is 3 + x' H x / 2.
    """

    def __init__(
        self, seed: int, *, count: int = 8, drift: float = 0.3,
        energy: float | Sequence[float] = 0.1, documents: int = 40, dimensions: int = 60,
    ) -> None:  # fmt: skip
        draw = np.random.default_rng(seed)
        self.hessian = draw.gamma(0.5, 1.0, dimensions)
        energies = np.broadcast_to(energy, (count,))[:, None]
        noise = draw.normal(size=(count, dimensions)) * np.sqrt(2 * energies / self.hessian.sum())
        slow = np.outer(np.linspace(drift, 0, count), draw.normal(size=dimensions))
        self.points = slow / np.sqrt(dimensions) + noise
        self._tokens = draw.integers(50, 400, documents)
        self._offsets = draw.normal(3, 0.5, documents)
        self._slopes = draw.normal(0, 0.3, (documents, dimensions))
        self._curves = self.hessian * draw.gamma(10, 0.1, (documents, dimensions))
        self.draw = draw

    def measured(self, weights: np.ndarray) -> Measurement:
        x = weights @ self.points
        nll = self._tokens * (self._offsets + self._slopes @ x + 0.5 * self._curves @ x**2)
        count = len(nll)
        documents = np.arange(count, dtype=np.int32)
        losses = Losses("blocks", ("text",), nll, self._tokens, self._tokens,
                        np.zeros(count, np.int32), documents)  # fmt: skip
        return measure(losses, {})

    def truth(self, weights: np.ndarray) -> float:
        x = weights @ self.points
        return 3 + 0.5 * float(self.hessian @ x**2)

    @property
    def seen(self) -> Observation:
        corners = np.eye(len(self.points))
        return Observation(tuple(range(len(corners))), tuple(map(self.measured, corners)))


def test_the_noise_energy_lies_within_two_standard_errors_of_the_truth_as_often_as_it_should() -> (
    None
):
    """95 % for normal errors; 40 documents behind each."""
    equal = np.full(8, 1 / 8)
    covered = []
    for seed in range(200):
        world = World(seed)
        found = energy_of(world.seen, equal, world.measured(equal))
        singles = np.mean([world.truth(corner) for corner in np.eye(8)])
        true = (singles - world.truth(equal)) / (1 - 1 / 8)
        covered.append(abs(found.value - true) <= 2 * (found.standard_error or 0))
    assert 0.91 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("drift", [0.0, 0.3, 1.0])
def test_merges_measure_within_two_standard_errors_of_their_prediction(drift: float) -> None:
    """Of random weights, and of the rule's own, which favour checkpoints with little noise."""
    misses = []
    for seed in range(40):
        world = World(seed, drift=drift)
        seen, equal = world.seen, np.full(8, 1 / 8)
        energy = energy_of(seen, equal, world.measured(equal))
        own = np.asarray(settled(seen, world.measured).answer.weights)
        model = LossModel(seen, np.full(8, True), energy, 8)
        for weights in (own, *world.draw.dirichlet(np.ones(8), 3)):
            expected = model.prediction(weights)
            found = world.measured(weights)
            misses.append((found.loss - expected.loss) / (expected.error_beside(found) or 0))
    assert np.mean(np.abs(misses) <= 2) >= 0.93
    assert np.sqrt(np.mean(np.square(misses))) > 0.3, "errors so wide that they say nothing"


def test_a_healthy_window_is_settled_with_one_probe_its_own_merge_and_a_guide_at_most() -> None:
    world = World(1, drift=1.0, documents=200)
    decision = settled(world.seen, world.measured, review=True)
    assert len(decision.seen.merges) <= 3
    assert len(decision.answer.predicted) == 1, "nothing was corrected"
    assert decision.is_final
    assert decision.answer.remarks == ()
    own = decision.seen.measured(decision.answer.weights)
    assert own is not None
    assert decision.answer.notes["measured_loss"] == own.loss


def test_weights_and_energies_of_every_domain_come_with_standard_errors() -> None:
    answer = settled(World(1).seen, World(1).measured).answer
    assert answer.errors is not None
    assert len(answer.errors) == 8
    assert max(answer.errors) > 0
    assert answer.notes["noise_energy.text"] == pytest.approx(answer.notes["noise_energy"])
    assert answer.notes["noise_energy_error.text"] > 0


def test_checkpoints_of_equal_quality_are_indistinguishable_from_uniform() -> None:
    """Twelve documents: their noise is larger than what the losses could tell apart."""
    world = World(3, drift=0.0, energy=0.02, documents=12, dimensions=5000)
    remarks = settled(world.seen, world.measured).answer.remarks
    assert any("indistinguishable from uniform" in remark for remark in remarks)
    drifting = World(3, drift=1.0, energy=0.02)
    remarks = settled(drifting.seen, drifting.measured).answer.remarks
    assert not any("indistinguishable" in remark for remark in remarks)


def test_a_damaged_checkpoint_does_not_widen_what_counts_as_agreement() -> None:
    damaged = window([2.00, 2.01, 9.00, 2.02])
    energy = energy_of(damaged, np.array([1, 1, 0, 1]) / 3, noisy(1.9, 95))
    weights = np.array([0.5, 0.3, 0.0, 0.2])
    healthy = LossModel(damaged, np.array([True, True, False, True]), energy, 4)
    assert healthy.prediction(weights).model_error < 0.002
    assert LossModel(damaged, np.full(4, True), energy, 4).prediction(weights).model_error > 0.1


# -- is it noise, or progress? -----------------------------------------------------------------

DECAY = np.geomspace(0.4, 0.05, 8)


def test_where_the_noise_differs_the_weights_become_those_of_least_variance() -> None:
    """Without drift a merge's loss is sum w_i^2 e_i: least where w_i is proportional to 1 / e_i.

    The newest are the noisiest: weights by age are no help, and are measured as the model says.
    """
    energies = DECAY[::-1]

    def measured(w: np.ndarray) -> Measurement:
        return noisy(2 + float(w**2 @ energies), 95)

    decision = settled(window((2 + energies).tolist()), measured, review=True)
    answer, (probe, first, guide, second) = decision.answer, decision.seen.merges
    assert answer.notes["noise_share"] == pytest.approx(1)
    assert answer.weights == pytest.approx(1 / energies / (1 / energies).sum())
    assert second.loss < min(probe.loss, first.loss, guide.loss)
    assert answer.predicted[second.weights].loss == pytest.approx(second.loss)
    assert answer.remarks == ()


def test_what_weights_by_age_show_is_used_as_far_as_it_goes() -> None:
    """Neighbours share their noise, the more the less there is of it, as at the end of a decay.

    L(w) = 2 + w C w with c_ij = sqrt(e_i e_j) 0.8^|i-j|: losses, 2 + e_i, do not show the power.
    """
    energies = np.geomspace(0.4, 0.02, 16)
    apart = np.abs(np.subtract.outer(np.arange(16), np.arange(16)))
    shared = np.sqrt(np.outer(energies, energies)) * np.power(0.8, apart)

    def measured(w: np.ndarray) -> Measurement:
        return noisy(2 + float(w @ shared @ w), 95)

    decision = settled(window((2 + energies).tolist()), measured, review=True)
    _, first, guide = decision.seen.merges[:3]
    assert guide.weights == pytest.approx(get_rule("ema")(decision.seen).weights)
    found = decision.seen.measured(decision.answer.weights)
    assert found is not None
    assert found.loss < first.loss - 0.001


@given(st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_way_to_a_guide_has_its_least_where_a_search_finds_it(random: object) -> None:
    draw = np.random.default_rng(random.randrange(2**32))  # type: ignore[attr-defined]
    losses, guide = draw.uniform(2, 2.2, 6), draw.dirichlet(np.ones(6))
    energy = Energy(float(draw.uniform(0.05, 0.5)), np.empty(0))
    model = LossModel(Observation.of(losses.tolist()), np.full(6, True), energy, 6)
    found = model.loss(guide) + float(draw.normal(0, 0.05))
    weights, expected, _ = model.towards(guide, Measurement(found))
    own = model.best_weights()
    bend = float(energy.value * ((guide - own) ** 2).sum())
    steps = np.linspace(0, 1, 2001)
    way = (1 - steps) * model.loss(own) + steps * found - steps * (1 - steps) * bend
    assert expected.loss == pytest.approx(way.min(), abs=1e-6)
    nearest = own + steps[way.argmin()] * (guide - own)
    assert weights == pytest.approx(nearest, abs=2e-3)


def test_where_the_loss_falls_and_the_noise_stays_nothing_is_corrected() -> None:
    losses = np.linspace(2.3, 2.0, 8)

    def measured(w: np.ndarray) -> Measurement:
        return noisy(float(w @ losses) - 0.2 * float(1 - w @ w), 95)

    decision = settled(window(losses.tolist()), measured, review=True)
    assert len(decision.seen.merges) == 2
    assert "noise_share" not in decision.answer.notes


@pytest.mark.parametrize(("drift", "energy"), [(0.0, DECAY), (0.6, DECAY), (0.6, 0.1), (1.5, 0.1)])
def test_the_correction_lowers_the_true_loss_or_leaves_it(
    drift: float, energy: float | Sequence[float]
) -> None:
    """On average over worlds, and never by much in any of them."""
    gains = []
    for seed in range(25):
        world = World(seed, drift=drift, energy=energy, documents=100)
        before = np.asarray(settled(world.seen, world.measured).answer.weights)
        after = np.asarray(settled(world.seen, world.measured, review=True).answer.weights)
        gains.append(world.truth(before) - world.truth(after))
    assert np.mean(gains) > (0 if energy is DECAY else -0.001)
    assert min(gains) > -0.01


def test_corrected_weights_measure_within_two_standard_errors_of_their_prediction() -> None:
    misses = []
    for seed in range(60):
        world = World(seed, drift=0.3, energy=DECAY, documents=100)
        answer = settled(world.seen, world.measured, review=True).answer
        if len(answer.predicted) == 2:
            corrected = list(answer.predicted)[1]
            found, expected = world.measured(np.array(corrected)), answer.predicted[corrected]
            misses.append((found.loss - expected.loss) / (expected.error_beside(found) or 0))
    assert len(misses) > 30
    assert np.mean(np.abs(misses) <= 2) >= 0.93
    assert np.sqrt(np.mean(np.square(misses))) > 0.2, "errors so wide that they say nothing"


def test_two_checkpoints_cannot_tell_noise_from_progress() -> None:
    """There is one distance between them, and one merge has measured it."""
    decision = settled(window([2.2, 2.0]), curved([2.2, 2.0], far=0.1, near=0.3), review=True)
    assert "noise_share" not in decision.answer.notes


# -- where the model fails ---------------------------------------------------------------------


def noisy(loss: float, number: int) -> Measurement:
    """A loss with resamples of standard deviation 0.001, independent of the others'."""
    drawn = np.random.default_rng(number).normal(0, 0.001, 200)
    return Measurement(loss, loss + drawn)


def window(losses: Sequence[float]) -> Observation:
    found = tuple(noisy(loss, number) for number, loss in enumerate(losses))
    return Observation(tuple(range(100, 100 * len(losses) + 1, 100)), found)


def test_where_averaging_gains_nothing_it_says_so_after_two_rounds() -> None:
    rounds = []
    losses = np.array([2.3, 2.1, 2.2, 2.0, 2.4, 2.3, 2.2, 2.1])

    def measured(vectors: Sequence[Sequence[float]]) -> list[Measurement]:
        rounds.append([np.count_nonzero(v) for v in vectors])
        return [noisy(float(np.dot(v, losses)), 99) for v in vectors]

    answer = decide(RULE, window(losses.tolist()), evaluate=measured).answer
    assert rounds == [[8], [4, 2]]
    assert answer.weights == (0, 0, 0, 1, 0, 0, 0, 0)
    assert answer.no_gain is not None
    assert answer.no_gain.startswith("no gain expected: the noise energy is +0.0000 +- ")
    assert "over 8, " in answer.no_gain


def test_a_window_that_reaches_back_into_warmup_is_shrunk_from_its_old_end() -> None:
    """Between old and new the loss is no bowl: there a mean is worse than both."""
    losses = [2.40, 2.40, 2.40, 2.40, 2.02, 2.01, 2.00, 2.01]

    def measured(w: np.ndarray) -> Measurement:
        bump = 2.0 * w[:4].sum() * w[4:].sum()
        return noisy(float(w @ losses) + bump - 0.1 * float(1 - w @ w), 98)

    answer = settled(window(losses), measured, review=True).answer
    assert answer.no_gain is None
    assert answer.weights[:4] == (0, 0, 0, 0)
    assert min(answer.weights[4:]) > 0.15
    assert "only the newest 4 checkpoints count" in answer.remarks[0]


def curved(losses: Sequence[float], *, far: float, near: float) -> Measure:
    """Averaging cancels ``near`` for the uniform merge and ``far`` for any other."""
    equal = np.full(len(losses), 1 / len(losses))

    def measured(w: np.ndarray) -> Measurement:
        energy = near if np.allclose(w, equal) else far
        return noisy(float(w @ np.asarray(losses)) - energy * float(1 - w @ w), 97)

    return measured


def test_a_failure_that_no_noise_share_explains_is_flagged_and_the_lowest_merge_is_taken() -> None:
    losses = [2.00, 2.01, 2.02, 2.03]
    decision = settled(window(losses), curved(losses, far=0.02, near=0.4), review=True)
    assert "the loss model does not hold here" in decision.answer.remarks[0]
    measured = {merge.weights: merge.loss for merge in decision.seen.merges}
    assert decision.answer.weights == min(measured, key=lambda weights: measured[weights])


def test_without_errors_of_the_losses_it_trusts_its_prediction() -> None:
    losses = [2.0, 2.1, 2.05]
    bare = Observation.of(losses)
    decision = settled(
        bare, lambda w: Measurement(curved(losses, far=0.29, near=0.3)(w).loss), review=True
    )
    assert decision.answer.remarks == ()
    assert decision.answer.errors is None
