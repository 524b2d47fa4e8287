"""The gate: its bound, its honesty over hundreds of tests, and what it says when it declines."""

import math
from typing import Literal

import numpy as np
import pytest
from scipy import stats

from ckptfuse.gate import (
    Opponent,
    best_member,
    compare,
    decline_unmerged,
    gate_key,
    judge,
    spent_alpha,
)
from ckptfuse.params import GateParams
from ckptfuse.records import Comparison, GateRecord
from tests.helpers import losses_on, member

GATE = GateParams(alpha=0.05, minimum_gain=0.002, domain_tolerance=0.01)
DOMAINS = ("prose", "python")


def against(
    fusion: np.ndarray,
    single: np.ndarray,
    *,
    kind: Literal["best", "newest"] = "newest",
    alpha: float = 0.05,
    domain: np.ndarray | None = None,
) -> Comparison:
    domains = DOMAINS if domain is not None else ("text",)
    opponent = Opponent(kind, member(300, 2.0), losses_on(single, domain=domain, domains=domains))
    merged = losses_on(fusion, domain=domain, domains=domains)
    return compare(merged, opponent, weights=dict.fromkeys(domains, 1.0), alpha=alpha)


def verdict(*comparisons: Comparison, test: int = 1) -> GateRecord:
    return judge(
        window="w", fusion="f", step=300, test=test, params=GATE, comparisons=list(comparisons)
    )


def test_the_bound_is_the_gain_less_students_t_times_its_error() -> None:
    single = np.array([30.0, 29.0, 31.0, 33.0, 30.0])
    fusion = single - np.array([1.0, 2.0, 1.5, 0.5, 1.0])
    found = against(fusion, single, alpha=0.01)
    differences = np.array([1.0, 2.0, 1.5, 0.5, 1.0]) / 10
    error = differences.std(ddof=1) / math.sqrt(5)
    assert found.gain == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(error)
    expected = differences.mean() - stats.t.ppf(0.99, 4) * error
    assert found.lower_bound == pytest.approx(expected)


def test_the_domain_with_the_fewest_documents_sets_the_degrees_of_freedom() -> None:
    domain = np.array([0] * 3 + [1] * 40)
    rng = np.random.default_rng(8)
    single = rng.normal(30, 2, size=43)
    found = against(single - rng.normal(1, 0.2, size=43), single, domain=domain)
    assert found.standard_error is not None
    expected = found.gain - stats.t.ppf(0.95, 2) * found.standard_error
    assert found.lower_bound == pytest.approx(expected)


def test_what_all_tests_may_spend_stays_below_alpha() -> None:
    assert sum(spent_alpha(0.05, n) for n in range(1, 5_000)) < 0.05
    assert spent_alpha(0.05, 1) == 0.025


def test_a_run_without_any_gain_almost_never_publishes() -> None:
    """200 runs of 50 fusions, each as good as its opponent but for noise."""
    rng = np.random.default_rng(5)
    alpha, runs = 0.1, 200
    base = np.full(40, 30.0)

    def publishes() -> bool:
        noise = enumerate(rng.normal(0, 0.5, size=(50, 40)), start=1)
        found = (against(base + drawn, base, alpha=spent_alpha(alpha, n)) for n, drawn in noise)
        return any(item.lower_bound is not None and item.lower_bound > 0 for item in found)

    rate = sum(publishes() for _ in range(runs)) / runs
    assert 0 < rate <= alpha + 2 * math.sqrt(alpha * (1 - alpha) / runs)


def test_a_true_gain_is_found_however_many_tests_went_before() -> None:
    rng = np.random.default_rng(6)
    single = rng.normal(30, 5, size=200)
    fusion = single - 1 + rng.normal(0, 0.5, size=200)
    found = against(fusion, single, alpha=spent_alpha(0.05, 500))
    assert found.lower_bound is not None
    assert 0.08 < found.lower_bound < found.gain


def test_a_clear_gain_is_published_with_its_numbers() -> None:
    single = np.linspace(25, 35, 30)
    found = verdict(against(single * 0.95, single))
    assert found.verdict == "publish"
    assert "+0.1500 than the newest checkpoint (step 300)" in found.reason


def test_a_model_against_itself_is_declined() -> None:
    single = np.linspace(25, 35, 30)
    found = verdict(against(single, single))
    assert found.verdict == "declined"
    assert "no proven gain over the newest checkpoint (step 300): +0.0000" in found.reason


def test_a_proven_gain_that_is_too_small_is_declined() -> None:
    single = np.linspace(25, 35, 30)
    found = verdict(against(single - 0.01, single))
    assert found.verdict == "declined"
    assert "0.002 needed" in found.reason


def test_a_domain_that_gets_worse_is_named() -> None:
    domain = np.repeat([0, 1], 20)
    single = np.tile(np.linspace(25, 35, 20), 2)
    fusion = np.where(domain == 0, single + 0.3, single - 3)
    found = verdict(against(fusion, single, domain=domain))
    assert found.verdict == "declined"
    assert "domain 'prose' is 0.0300 nats worse" in found.reason
    assert "python" not in found.reason


def test_a_domain_within_its_tolerance_is_no_objection() -> None:
    domain = np.repeat([0, 1], 20)
    single = np.tile(np.linspace(25, 35, 20), 2)
    fusion = np.where(domain == 0, single + 0.09, single - 3)
    assert verdict(against(fusion, single, domain=domain)).verdict == "publish"


def test_a_domain_of_weight_zero_still_has_its_tolerance_but_no_say_in_the_gain() -> None:
    """One document of it takes no degrees of freedom from the others."""
    domain = np.array([0, *[1] * 20])
    single = np.array([30.0, *np.linspace(25, 35, 20)])
    opponent = Opponent("best", member(300, 2.0), losses_on(single, domain=domain, domains=DOMAINS))
    merged = losses_on(single - np.where(domain == 0, -9.0, 1.0), domain=domain, domains=DOMAINS)
    found = compare(merged, opponent, weights={"prose": 0.0, "python": 1.0}, alpha=0.05)
    assert found.lower_bound == pytest.approx(0.1)
    assert verdict(found).reason == (
        "domain 'prose' is 0.9000 nats worse than the best single one (step 300), 0.01 tolerated"
    )


def test_losing_to_the_best_single_checkpoint_is_enough_to_decline() -> None:
    single = np.linspace(25, 35, 30)
    better = against(single * 0.95, single)
    worse = against(single, single, kind="best").model_copy(update={"fingerprint": "another"})
    assert verdict(better, worse).verdict == "declined"


def test_the_newest_that_is_also_the_best_is_named_once() -> None:
    single = np.linspace(25, 35, 30)
    pair = [against(single * 0.9, single, kind=kind) for kind in ("best", "newest")]
    assert verdict(*pair).reason.count("step 300") == 1


def test_one_document_proves_nothing() -> None:
    found = verdict(against(np.array([10.0]), np.array([30.0])))
    assert found.verdict == "declined"
    assert "fewer than two audit documents" in found.reason


def test_the_best_member_is_the_newest_of_equals() -> None:
    assert best_member([member(100, 2.0), member(200, 2.0), member(300, 2.5)]).step == 200


def test_a_window_with_nothing_to_merge_is_declined_without_a_comparison() -> None:
    found = decline_unmerged(
        window="w", fusion="f", step=300, test=3, params=GATE, reason="no gain expected"
    )
    assert found.verdict == "declined"
    assert found.reason == "no gain expected"
    assert (found.test, found.alpha) == (3, pytest.approx(0.05 / 12))


def test_a_verdict_is_keyed_by_all_that_it_depends_on() -> None:
    usual = {"window": "w", "fusion": "f", "audit_blocks": "b", "params": GATE,
             "members": {"best": "1", "newest": "2"}}  # fmt: skip
    stricter, another = GateParams(alpha=0.01), {"best": "2", "newest": "2"}
    changes = [{}, {"window": "x"}, {"fusion": "x"}, {"audit_blocks": "x"}, {"params": stricter},
               {"members": another}]  # fmt: skip
    assert len({gate_key(**{**usual, **change}) for change in changes}) == 6  # type: ignore[arg-type]
    swapped = {"members": {"newest": "2", "best": "1"}}
    assert gate_key(**{**usual, **swapped}) == gate_key(**usual)  # type: ignore[arg-type]
