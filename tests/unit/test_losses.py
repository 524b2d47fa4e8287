"""Losses, their standard errors and paired differences, against numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfuse.errors import RecordError
from ckptfuse.losses import Estimate, bits_per_byte, combine, perplexity
from tests.helpers import losses_on


def test_a_loss_is_the_sum_of_nats_over_the_sum_of_tokens_and_no_mean_of_means() -> None:
    losses = losses_on(np.array([10.0, 60.0]), tokens=np.array([10, 20]))
    assert losses.of("text").mean == pytest.approx(70 / 30)


def test_the_standard_error_takes_documents_as_clusters() -> None:
    """Two documents of two blocks each: residuals 5 + 5 and -5 - 5 about a mean of 1.5."""
    losses = losses_on(np.array([20.0, 20.0, 10.0, 10.0]), documents=np.array([0, 0, 1, 1]))
    estimate = losses.of("text")
    assert estimate.mean == pytest.approx(1.5)
    assert estimate.documents == 2
    assert estimate.standard_error == pytest.approx(math.sqrt(2 / 1 * (10**2 + 10**2)) / 40)


def test_blocks_of_one_document_are_no_evidence_of_precision() -> None:
    one = losses_on(np.array([20.0, 10.0] * 8), documents=np.zeros(16, np.int32))
    assert one.of("text").standard_error == math.inf


def test_a_paired_difference_cancels_what_makes_a_document_hard() -> None:
    hard = np.array([10.0, 50.0, 90.0, 30.0])
    difference = losses_on(hard).minus(losses_on(hard - 1))["text"]
    assert difference.mean == pytest.approx(0.1)
    assert difference.standard_error == pytest.approx(0, abs=1e-12)


def test_losses_on_other_blocks_are_not_compared() -> None:
    nll = np.ones(3)
    with pytest.raises(RecordError, match="cannot be compared"):
        losses_on(nll, blocks="these").minus(losses_on(nll, blocks="those"))


def test_domains_combine_as_a_weighted_mean_with_independent_errors() -> None:
    estimates = {"a": Estimate(2.0, 0.3, 4), "b": Estimate(4.0, 0.4, 5)}
    combined = combine(estimates, {"a": 3.0, "b": 1.0})
    assert combined.mean == pytest.approx(2.5)
    assert combined.standard_error == pytest.approx(math.hypot(0.75 * 0.3, 0.25 * 0.4))


def test_a_domain_of_weight_zero_is_left_out_even_if_it_has_no_error() -> None:
    estimates = {"a": Estimate(2.0, 0.3, 4), "b": Estimate(9.0, math.inf, 1)}
    assert combine(estimates, {"a": 1.0, "b": 0.0}) == Estimate(2.0, 0.3, 4)


def test_bits_per_byte_count_the_text_and_not_the_tokens() -> None:
    assert bits_per_byte(math.log(2) * 3, tokens=10, byte_count=30) == pytest.approx(1)


def test_without_bytes_there_are_no_bits_per_byte() -> None:
    assert math.isnan(bits_per_byte(1.0, tokens=10, byte_count=0))


def test_a_perplexity_that_no_float_holds_is_none() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(710.0) is None


def test_domains_keep_their_blocks_apart() -> None:
    losses = losses_on(
        np.array([10.0, 40.0, 30.0]),
        tokens=np.array([10, 10, 20]),
        domain=np.array([0, 1, 0]),
        domains=("prose", "python"),
    )
    assert {name: found.mean for name, found in losses.by_domain().items()} == {
        "prose": pytest.approx(40 / 30),
        "python": pytest.approx(4),
    }
    assert losses.totals("prose") == (30, 80)
    target = losses.target({"prose": 3.0, "python": 1.0})
    assert target.mean == pytest.approx(0.75 * 40 / 30 + 0.25 * 4)


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.integers(1, 50), st.integers(0, 4)), min_size=2, max_size=20
    )
)
def test_how_documents_are_cut_into_blocks_changes_nothing(
    drawn: list[tuple[float, int, int]],
) -> None:
    """Summing a document's blocks to one gives the same mean and the same standard error."""
    nll, tokens, documents = (np.array(column) for column in zip(*drawn, strict=True))
    kept = np.unique(documents)
    whole = losses_on(
        np.array([nll[documents == g].sum() for g in kept]),
        tokens=np.array([tokens[documents == g].sum() for g in kept]),
    ).of("text")
    cut = losses_on(nll, tokens=tokens, documents=documents).of("text")
    assert cut.mean == pytest.approx(whole.mean)
    assert cut.standard_error == pytest.approx(whole.standard_error, abs=1e-9)
    assert cut.documents == whole.documents
