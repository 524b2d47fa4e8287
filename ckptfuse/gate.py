"""The gate: is the fusion better, on text that chose nothing?

On the audit split the fusion is compared with the best single checkpoint of the window (chosen on
selection) and with the newest, by paired differences with documents as clusters (losses.py).
It passes when, for both, the lower confidence bound of the gain exceeds the minimum gain

    gain - t(1 - alpha_n, G - 1) * se  >  minimum_gain

and no domain is worse than its tolerance. Hundreds of fusions are tested in a run: test number n
may spend alpha_n = alpha / (n (n + 1)), which sums to alpha over any number of tests, so the chance
that a run without any gain publishes even once stays below alpha (a union bound).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ckptfuse.digests import digest
from ckptfuse.losses import Estimate, Losses, combine
from ckptfuse.params import GateParams
from ckptfuse.records import Comparison, GateRecord, Member


@dataclass(frozen=True, slots=True)
class Opponent:
    """A single checkpoint to beat, with its losses on audit."""

    against: Literal["best", "newest"]
    member: Member
    losses: Losses


def spent_alpha(alpha: float, test: int) -> float:
    """The share of alpha of the n-th test, n from 1."""
    return alpha / (test * (test + 1))


def gate_key(
    *, window: str, fusion: str, audit_blocks: str, params: GateParams, members: Mapping[str, str]
) -> str:
    """Key of a verdict: what was tested, on what, how strictly, against whom."""
    return digest([window, fusion, audit_blocks, params.model_dump(), sorted(members.items())])


def best_member(members: list[Member]) -> Member:
    """The checkpoint with the lowest selection loss, the newest of equals."""
    return min(reversed(members), key=lambda member: member.loss)


def compare(
    fusion: Losses, opponent: Opponent, *, weights: Mapping[str, float], alpha: float
) -> Comparison:
    """How much lower the fusion's target loss is than the opponent's, in nats."""
    differences = opponent.losses.minus(fusion)
    gain = combine(differences, weights)
    counted = [d.documents for name, d in differences.items() if weights.get(name, 1.0) > 0]
    bound = _lower_bound(gain, clusters=min(counted), alpha=alpha)
    return Comparison(
        against=opponent.against,
        name=opponent.member.name,
        step=opponent.member.step,
        fingerprint=opponent.member.fingerprint,
        gain=gain.mean,
        standard_error=gain.standard_error if math.isfinite(gain.standard_error) else None,
        lower_bound=bound,
        documents=gain.documents,
        domains={name: estimate.mean for name, estimate in differences.items()},
    )


def _lower_bound(gain: Estimate, *, clusters: int, alpha: float) -> float | None:
    """One-sided bound; the fewest clusters of any counted domain set the degrees of freedom."""
    if clusters < 2 or not math.isfinite(gain.standard_error):
        return None
    from scipy import stats

    return gain.mean - float(stats.t.ppf(1 - alpha, clusters - 1)) * gain.standard_error


def judge(
    *,
    window: str,
    fusion: str,
    step: int,
    test: int,
    params: GateParams,
    comparisons: list[Comparison],
) -> GateRecord:
    """The verdict, with the sentence that says why."""
    distinct = {c.fingerprint: c for c in comparisons}.values()  # the newest may be the best
    reasons = [reason for item in distinct for reason in _objections(item, params)]
    gains = " and ".join(f"{c.gain:+.4f} than {_name(c)}" for c in distinct)
    return GateRecord(
        window=window,
        fusion=fusion,
        step=step,
        verdict="declined" if reasons else "publish",
        reason="; ".join(reasons) if reasons else f"better on audit (nats): {gains}",
        test=test,
        alpha=spent_alpha(params.alpha, test),
        comparisons=comparisons,
    )


def decline_unmerged(
    *, window: str, fusion: str, step: int, test: int, params: GateParams, reason: str
) -> GateRecord:
    """The verdict where the rule finds nothing to merge."""
    return GateRecord(
        window=window,
        fusion=fusion,
        step=step,
        verdict="declined",
        reason=reason,
        test=test,
        alpha=spent_alpha(params.alpha, test),
        comparisons=[],
    )


def _name(comparison: Comparison) -> str:
    kind = "the newest checkpoint" if comparison.against == "newest" else "the best single one"
    return f"{kind} (step {comparison.step})"


def _objections(comparison: Comparison, params: GateParams) -> list[str]:
    objections = []
    bound, error = comparison.lower_bound, comparison.standard_error
    if bound is None or error is None:
        objections.append("a domain has fewer than two audit documents, so no gain can be shown")
    elif bound <= params.minimum_gain:
        objections.append(
            f"no proven gain over {_name(comparison)}: {comparison.gain:+.4f} +- {error:.4f} nats, "
            f"lower bound {bound:+.4f}, {params.minimum_gain:g} needed"
        )
    for name, gain in comparison.domains.items():
        if gain < -params.domain_tolerance:
            objections.append(
                f"domain {name!r} is {-gain:.4f} nats worse than {_name(comparison)}, "
                f"{params.domain_tolerance:g} tolerated"
            )
    return objections
