"""The gate: its bound, its honesty over hundreds of tests, and what it says when it declines."""

import math
from typing import Literal

import numpy as np
import pytest
from scipy import stats

from ckptfuse.gate import Opponent, best_member, compare, judge, spent_alpha
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


def test_what_all_tests_may_spend_stays_below_alpha() -> None:
    assert sum(spent_alpha(0.05, n) for n in range(1, 5_000)) < 0.05
    assert spent_alpha(0.05, 1) == 0.025


def test_a_run_without_any_gain_almost_never_publishes() -> None:
    """400 runs of 60 fusions, each as good as its opponent but for noise: at most alpha publish."""
    rng = np.random.default_rng(5)
    published = 0
    for _ in range(400):
        noise = rng.normal(0, 0.5, size=(60, 40))
        base = np.full(40, 30.0)
        for number, drawn in enumerate(noise, start=1):
            found = against(base + drawn, base, alpha=spent_alpha(0.05, number))
            assert found.lower_bound is not None
            if found.lower_bound > 0:
                published += 1
                break
    assert published / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


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
