"""Bootstrap over documents: paired, repeatable, and as wide as the formula says."""

import numpy as np
import pytest

from ckptfuse.losses import Losses, combine
from ckptfuse.resampling import RESAMPLES, measure
from ckptfuse.rules import Observation
from ckptfuse.rules.observation import deviation


def losses(seed: int, documents: tuple[int, int] = (60, 60), shift: float = 0.0) -> Losses:
    """Two domains of two blocks a document; documents of very different hardness."""
    text = np.random.default_rng(7)  # the same documents for every model
    count = 2 * sum(documents)
    document = np.repeat(np.arange(sum(documents)), 2).astype(np.int32)
    domain = (document >= documents[0]).astype(np.int32)
    tokens = text.integers(20, 200, count)
    hardness = np.repeat(text.normal(3, 1, sum(documents)), 2)
    own = np.random.default_rng(seed).normal(0, 0.05, count)
    nll = tokens * (hardness + own + shift)
    return Losses("blocks", ("code", "prose"), nll, tokens, tokens, domain, document)


def error(resampled: np.ndarray) -> float:
    found = deviation(resampled)
    assert found is not None
    return found


def test_the_loss_is_the_weighted_mean_over_domains_and_each_domain_is_there() -> None:
    found = measure(losses(1), {"code": 3.0, "prose": 1.0})
    assert found.loss == losses(1).target({"code": 3.0, "prose": 1.0}).mean
    assert found.domains["prose"].loss == losses(1).of("prose").mean
    mixed = 0.75 * found.domains["code"].resampled + 0.25 * found.domains["prose"].resampled
    assert found.resampled == pytest.approx(mixed)
    assert found.resampled.shape == (RESAMPLES,)


def test_its_standard_errors_are_those_of_the_linearised_ratio() -> None:
    found = measure(losses(1), {})
    assert error(found.resampled) == pytest.approx(losses(1).target({}).standard_error, rel=0.15)
    expected = losses(1).of("code").standard_error
    assert error(found.domains["code"].resampled) == pytest.approx(expected, rel=0.15)


def test_what_makes_a_document_hard_cancels_between_two_models() -> None:
    first, second = losses(1), losses(2, shift=0.1)
    expected = combine(second.minus(first), {})
    paired = measure(second, {}).resampled - measure(first, {}).resampled
    assert error(paired) == pytest.approx(expected.standard_error, rel=0.15)
    assert error(paired) < error(measure(first, {}).resampled) / 10


def test_few_documents_do_not_make_errors_small() -> None:
    """With all G drawn the variance of four would come out at 3/4 of what it is."""
    few = losses(1, documents=(4, 4))
    expected = few.target({}).standard_error
    assert error(measure(few, {}).resampled) == pytest.approx(expected, rel=0.25)


def test_the_same_losses_have_the_same_resamples() -> None:
    assert (measure(losses(1), {}).resampled == measure(losses(1), {}).resampled).all()


def test_of_a_single_document_no_error_is_known() -> None:
    found = measure(losses(1, documents=(1, 30)), {})
    assert found.resampled.size == 0
    assert found.domains["code"].resampled.size == 0
    assert found.domains["prose"].resampled.size == RESAMPLES
    without = measure(losses(1, documents=(1, 30)), {"code": 0.0})
    assert without.resampled == pytest.approx(found.domains["prose"].resampled)


def test_a_window_with_an_unknown_error_has_none() -> None:
    known, unknown = measure(losses(1), {}), measure(losses(1, documents=(1, 30)), {})
    assert Observation((1, 2), (known, known)).resampled.shape == (RESAMPLES, 2)
    assert Observation((1, 2), (known, unknown)).resampled.shape == (0, 2)
