"""The gate: its bound, its honesty over hundreds of tests, and what it says when it declines."""

import math
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptfuse.gate import (
    Opponent,
    Share,
    best_member,
    compare,
    decline_unmerged,
    declined_streak,
    gate_key,
    judge,
    lower_bound,
    next_share,
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


def verdict(*comparisons: Comparison) -> GateRecord:
    return judge(
        window="w", fusion="f", step=300, share=Share(1, 0.05), params=GATE,
        comparisons=list(comparisons),
    )  # fmt: skip


@pytest.fixture(scope="module")
def real() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Real gains in nats [18, 292] of documents of so many tokens [292], by merges of small models.

    Two Llamas of 64 hidden units, trained 420 to 720 steps, one under a decaying learning rate;
    uniform merges of 2, 4 and 6 checkpoints against the newest of them.
    """
    with np.load(Path(__file__).parent / "data" / "audit_gains.npz") as found:
        return found["gains"].astype(np.float64), found["tokens"].astype(np.float64)


# -- one test ----------------------------------------------------------------------------------


def test_the_lower_bound_is_where_the_sum_of_signed_documents_reaches_its_quantile() -> None:
    rng = np.random.default_rng(0)
    shares = rng.uniform(1, 5, size=80)
    shares /= shares.sum()
    gains = shares * rng.normal(0.05, 0.03, size=80)
    bound = lower_bound(gains, shares, alpha=1e-4)
    assert bound is not None
    errors = gains - bound * shares
    x = errors.sum() / math.sqrt(errors @ errors)
    normal = NormalDist()
    constant = 1 / (4 * normal.cdf(-math.sqrt(2)))
    assert constant == pytest.approx(3.178, abs=1e-3)
    assert constant * normal.cdf(-x) == pytest.approx(1e-4)


@settings(max_examples=50, deadline=None)
@given(signs=st.lists(st.booleans(), min_size=8, max_size=14), alpha=st.floats(1e-4, 0.2))
def test_few_documents_of_equal_size_never_claim_more_than_their_signs_allow(
    signs: list[bool], alpha: float
) -> None:
    """Exactly: the chance of so many documents for the fusion, were both signs equally likely."""
    count, ups = len(signs), sum(signs)
    gains = np.where(signs, 1.0, -1.0) / count
    bound = lower_bound(gains, np.full(count, 1 / count), alpha=alpha)
    chance = sum(math.comb(count, k) for k in range(ups, count + 1)) / 2**count
    if bound is not None and bound > 0:
        assert chance <= alpha


def test_the_bound_rises_with_the_gain_and_falls_with_the_level() -> None:
    rng = np.random.default_rng(1)
    shares = np.full(60, 1 / 60)
    gains = shares * rng.normal(0.1, 0.05, size=60)
    strict, loose = (lower_bound(gains, shares, alpha=a) for a in (1e-5, 0.05))
    assert strict is not None
    assert loose is not None
    assert strict < loose < gains.sum()
    assert lower_bound(gains + 0.01 * shares, shares, alpha=0.05) == pytest.approx(loose + 0.01)


def test_one_long_document_among_short_ones_counts_as_the_few_that_it_leaves() -> None:
    lengths = np.array([10_000.0, *[10.0] * 200])
    shares = lengths / lengths.sum()
    assert lower_bound(0.5 * shares, shares, alpha=0.05) is None
    even = np.full(201, 1 / 201)
    assert lower_bound(0.5 * even, even, alpha=0.05) == pytest.approx(0.5)


def test_domains_count_with_their_weights() -> None:
    domain = np.repeat([0, 1], 40)
    rng = np.random.default_rng(8)
    single = rng.normal(30, 2, size=80)
    fusion = single - np.where(domain == 0, 1.0, 3.0)
    found = against(fusion, single, domain=domain)
    assert found.gain == pytest.approx(0.2)
    assert found.lower_bound is not None
    assert 0.17 < found.lower_bound < 0.2


# -- a run of tests ----------------------------------------------------------------------------


def test_shares_sum_to_alpha_whatever_is_published() -> None:
    assert next_share(0.05, []).alpha == pytest.approx(0.05 * (1 - math.log(2) / math.log(3)))
    failed = sum(next_share(0.05, [False] * n).alpha for n in range(3_000))
    assert 0.04 < failed < 0.05
    assert next_share(0.05, [True] * 3_000).alpha == pytest.approx(failed + next_share(
        0.05, [False] * 3_000).alpha)  # fmt: skip


def test_a_published_test_hands_its_share_on_and_a_declined_one_does_not() -> None:
    def share(*published: bool) -> Share:
        return next_share(0.05, published)

    alone = [next_share(0.05, [False] * n).alpha for n in range(4)]
    assert share(False, True).alpha == pytest.approx(alone[1] + alone[2])
    assert share(False, True, True).alpha == pytest.approx(alone[1] + alone[2] + alone[3])
    assert share(True, True, False) == Share(4, pytest.approx(alone[3]))


def null_runs_that_publish(
    gains: NDArray[np.float64], tokens: NDArray[np.float64], *, documents: int, runs: int
) -> float:
    """Share of runs without any gain that publish something, on so many documents.

    In each, the fusions' differences from their mean have the sign of each document flipped, one
    draw for the whole run: the audit text is the same in all tests.
    """
    rng = np.random.default_rng(documents)
    found = 0
    for _ in range(runs):
        chosen = rng.choice(len(tokens), documents, replace=False)
        shares = tokens[chosen] / tokens[chosen].sum()
        centred = gains - np.outer(gains.sum(axis=1) / tokens.sum(), tokens)
        flipped = centred[:, chosen] * rng.choice([-1, 1], documents) / tokens[chosen].sum()
        published: list[bool] = []
        for fusion in rng.permutation(flipped):
            bound = lower_bound(fusion, shares, alpha=next_share(0.05, published).alpha)
            published.append(bound is not None and bound > 0)
        found += any(published)
    return found / runs


@pytest.mark.parametrize("documents", [12, 292])
def test_at_most_five_percent_of_runs_without_a_gain_publish_anything(
    real: tuple[NDArray[np.float64], NDArray[np.float64]], documents: int
) -> None:
    rate = null_runs_that_publish(*real, documents=documents, runs=300)
    assert rate <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


def test_fusions_that_gain_make_up_for_no_others_error(
    real: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    """Every second fusion gains much: it passes, and hands on only what was its own."""
    gains, tokens = real
    rng = np.random.default_rng(9)
    shares = tokens / tokens.sum()
    centred = gains - np.outer(gains.sum(axis=1) / tokens.sum(), tokens)
    wrong = passed = 0
    for _ in range(200):
        flipped = centred * rng.choice([-1, 1], len(tokens)) / tokens.sum()
        published: list[bool] = []
        for number, fusion in enumerate(flipped):
            alpha = next_share(0.05, published).alpha
            bound = lower_bound(fusion + 0.2 * (number % 2) * shares, shares, alpha=alpha)
            published.append(bound is not None and bound > 0)
        wrong += any(published[::2])
        passed += sum(published[1::2])
    assert wrong / 200 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)
    assert passed / (200 * 9) > 0.9


def test_in_a_healthy_run_a_gain_of_three_errors_is_found_at_the_three_hundredth_test(
    real: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    """alpha / (n (n + 1)) would ask for five."""
    gains, tokens = real
    shares = tokens / tokens.sum()
    centred = gains[0] / tokens.sum() - gains[0].sum() / tokens.sum() * shares
    error = math.sqrt(centred @ centred)
    level = next_share(0.05, [True] * 299).alpha
    found = lower_bound(centred + 3 * error * shares, shares, alpha=level)
    former = lower_bound(centred + 3 * error * shares, shares, alpha=0.05 / (300 * 301))
    assert found is not None
    assert former is not None
    assert former < 0 < found


# -- the verdict -------------------------------------------------------------------------------


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
    assert "1 audit documents are too few to show a gain" in found.reason


def test_noise_in_a_domain_with_little_text_is_no_objection_and_a_collapse_is() -> None:
    domain = np.array([0] * 6 + [1] * 40)
    noise = np.array([-1.5, 2.0, -1.0, 1.2, -2.0, 2.5])  # 0.2 nats a document for 10 tokens
    single = np.full(46, 30.0)
    fusion = single - 3
    fusion[:6] = single[:6] + noise
    noisy = verdict(against(fusion, single, domain=domain))
    assert noisy.verdict == "publish"
    fusion[:6] += 4
    assert "domain 'prose'" in verdict(against(fusion, single, domain=domain)).reason


def test_the_best_member_is_the_newest_of_equals() -> None:
    assert best_member([member(100, 2.0), member(200, 2.0), member(300, 2.5)]).step == 200


def test_a_window_with_nothing_to_merge_is_declined_without_a_comparison() -> None:
    found = decline_unmerged(window="w", fusion="f", step=300, reason="no gain expected")
    assert found.verdict == "declined"
    assert found.reason == "no gain expected"
    assert (found.test, found.alpha) == (0, 0.0)


def test_a_verdict_is_keyed_by_all_that_it_depends_on() -> None:
    usual = {"window": "w", "fusion": "f", "audit_blocks": "b", "params": GATE,
             "members": {"best": "1", "newest": "2"}}  # fmt: skip
    stricter, another = GateParams(alpha=0.01), {"best": "2", "newest": "2"}
    changes = [{}, {"window": "x"}, {"fusion": "x"}, {"audit_blocks": "x"}, {"params": stricter},
               {"members": another}]  # fmt: skip
    assert len({gate_key(**{**usual, **change}) for change in changes}) == 6  # type: ignore[arg-type]
    swapped = {"members": {"newest": "2", "best": "1"}}
    assert gate_key(**{**usual, **swapped}) == gate_key(**usual)  # type: ignore[arg-type]


def verdict_of(step: int, verdict: str, test: int) -> GateRecord:
    return GateRecord.model_validate(
        {"window": f"{step}-{test}", "fusion": "f", "step": step, "verdict": verdict,
         "reason": "because", "test": test, "alpha": 0.01, "comparisons": []}
    )  # fmt: skip


def test_a_streak_counts_back_by_step_and_of_one_step_by_test() -> None:
    verdicts = [verdict_of(100, "publish", 1), verdict_of(200, "publish", 2)]
    assert declined_streak(verdicts) == 0
    again = verdict_of(200, "declined", 3)  # under other parameters
    assert declined_streak([again, *verdicts]) == 1
    assert declined_streak([verdict_of(300, "declined", 0), again, *verdicts]) == 2
