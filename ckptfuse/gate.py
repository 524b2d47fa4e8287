"""The gate: is the fusion better, on text that chose nothing?

On the audit split the fusion is compared with the best single checkpoint of the window (chosen on
selection) and with the newest, document by document. It passes when, for both, the lower bound of
the gain exceeds the minimum gain, and no domain is worse than its tolerance by more than two
standard errors.

**One test.** Document g gained d_g nats over t_g tokens (of T in its domain, which counts w, all w
summing to 1). If the true gain is m and documents err from it to both sides alike, then, whatever
their number, lengths and tails (Bentkus and Dzindzalieta, Bernoulli 21, 2015)::

    y_g = w (d_g - m t_g) / T
    P(sum_g y_g >= x sqrt(sum_g y_g^2))  <=  C P(N(0, 1) >= x),    C = 1 / (4 P(N(0, 1) >= sqrt 2))

The lower bound is the smallest m that this does not refute: a quadratic equation. Student's t would
take it for granted that a sum of few or very unequal documents is normal far into its tail, where
the levels of a long run lie. Below x^2 documents (of equal length) nothing can be shown at all.

**Error over the run.** Hundreds of fusions are tested, in the order of training. Test n may err
with chance

    alpha_n = alpha * (gamma_j + ... + gamma_n)

where gamma sums to 1 and j is the first of the unbroken row of published tests before n (j = n if
test n - 1 was declined): what was published hands its share on to the next (online fallback: Tian
and Ramdas, Statistical Methods in Medical Research 30, 2021). Then a run publishes a fusion without
a gain with chance alpha at most, however its tests depend on each other:

    Which fusions have no gain is settled before audit text is seen: weights come from selection.
    Let i be the first of them to be published, i' the one of them before it. Test i' was declined,
    so the row before i begins after i', and alpha_i <= alpha * (gamma_(i'+1) + ... + gamma_i),
    which does not depend on the data. Such bounds of all i share no gamma: they sum to alpha.

gamma_n = log 2 / log(n + 1) - log 2 / log(n + 2) falls about as slowly as a sum to 1 can. A window
where nothing is merged looks at no audit text, and is no test.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ckptfuse.digests import digest
from ckptfuse.losses import Losses, combine
from ckptfuse.params import GateParams
from ckptfuse.records import Comparison, DomainGain, GateRecord, Member

_NORMAL = NormalDist()
_SYMMETRIC = 1 / (4 * _NORMAL.cdf(-math.sqrt(2)))


@dataclass(frozen=True, slots=True)
class Opponent:
    """A single checkpoint to beat, with its losses on audit."""

    against: Literal["best", "newest"]
    member: Member
    losses: Losses


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the run's error that one test may spend; ``test`` counts from 1."""

    test: int
    alpha: float


#: Of a window where nothing is merged, so that nothing is tested.
NO_TEST = Share(0, 0.0)


def next_share(alpha: float, published: Sequence[bool]) -> Share:
    """The share of the test that follows those with these outcomes."""
    row = 0
    while row < len(published) and published[-1 - row]:
        row += 1
    test = len(published) + 1
    return Share(test, alpha * (_left(test - row) - _left(test + 1)))


def _left(test: int) -> float:
    """The sum of gamma from this test on."""
    return math.log(2) / math.log(test + 1)


def gate_key(
    *, window: str, fusion: str, audit_blocks: str, params: GateParams, members: Mapping[str, str]
) -> str:
    """Key of a verdict: what was tested, on what, how strictly, against whom."""
    return digest([window, fusion, audit_blocks, params.model_dump(), sorted(members.items())])


def best_member(members: list[Member]) -> Member:
    """The checkpoint with the lowest selection loss, the newest of equals."""
    return min(reversed(members), key=lambda member: member.loss)


def declined_streak(verdicts: Iterable[GateRecord]) -> int:
    """How many of the newest, in the order of training, were declined since one last passed."""
    newest_first = sorted(verdicts, key=lambda v: (v.step, v.test), reverse=True)
    return sum(1 for _ in takewhile(lambda v: v.verdict == "declined", newest_first))


def compare(
    fusion: Losses, opponent: Opponent, *, weights: Mapping[str, float], alpha: float
) -> Comparison:
    """How much lower the fusion's target loss is than the opponent's, in nats."""
    differences = opponent.losses.minus(fusion)
    gain = combine(differences, weights)
    return Comparison(
        against=opponent.against,
        name=opponent.member.name,
        step=opponent.member.step,
        fingerprint=opponent.member.fingerprint,
        gain=gain.mean,
        standard_error=_finite(gain.standard_error),
        lower_bound=lower_bound(*_documents(fusion, opponent.losses, weights), alpha=alpha),
        documents=gain.documents,
        domains={
            name: DomainGain(gain=found.mean, standard_error=_finite(found.standard_error))
            for name, found in differences.items()
        },
    )


def _documents(
    fusion: Losses, opponent: Losses, weights: Mapping[str, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each document's part of the gain and of the weight, [G] each; they sum to gain and 1."""
    total = sum(weights.get(name, 1.0) for name in fusion.domains)
    gains, shares = [], []
    for name in fusion.domains:
        weight = weights.get(name, 1.0) / total
        if weight > 0:
            ours, tokens = fusion.documents(name)
            theirs, _ = opponent.documents(name)
            gains.append(weight * (theirs - ours) / tokens.sum())
            shares.append(weight * tokens / tokens.sum())
    return np.concatenate(gains), np.concatenate(shares)


def lower_bound(
    gains: NDArray[np.float64], shares: NDArray[np.float64], *, alpha: float
) -> float | None:
    """The largest m such that gains below m are refuted; None if there are too few documents.

    ``gains`` and ``shares`` [G], of each document, as parts of the gain in nats and of 1.
    """
    x = -_NORMAL.inv_cdf(min(alpha / _SYMMETRIC, 0.5))
    gain = float(gains.sum())
    rest = gains - gain * shares
    # With m = gain - u:  sum y = u,  y = rest + u * shares,  and u^2 = x^2 sum y^2.
    square = 1 - x**2 * float(shares @ shares)
    if square <= 0:
        return None
    half = x**2 * float(rest @ shares)
    return gain - (half + math.sqrt(half**2 + square * x**2 * float(rest @ rest))) / square


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def judge(
    *,
    window: str,
    fusion: str,
    step: int,
    share: Share,
    params: GateParams,
    comparisons: list[Comparison],
) -> GateRecord:
    """The verdict, with the sentence that says why."""
    distinct = {c.fingerprint: c for c in comparisons}.values()  # the newest may be the best
    reasons = [reason for item in distinct for reason in _objections(item, share, params)]
    gains = " and ".join(f"{c.gain:+.4f} than {_name(c)}" for c in distinct)
    return GateRecord(
        window=window,
        fusion=fusion,
        step=step,
        verdict="declined" if reasons else "publish",
        reason="; ".join(reasons) if reasons else f"better on audit (nats): {gains}",
        test=share.test,
        alpha=share.alpha,
        comparisons=comparisons,
    )


def decline_unmerged(*, window: str, fusion: str, step: int, reason: str) -> GateRecord:
    """The verdict where the rule finds nothing to merge."""
    return GateRecord(
        window=window,
        fusion=fusion,
        step=step,
        verdict="declined",
        reason=reason,
        test=NO_TEST.test,
        alpha=NO_TEST.alpha,
        comparisons=[],
    )


def _name(comparison: Comparison) -> str:
    kind = "the newest checkpoint" if comparison.against == "newest" else "the best single one"
    return f"{kind} (step {comparison.step})"


def _objections(comparison: Comparison, share: Share, params: GateParams) -> list[str]:
    objections = []
    bound, error = comparison.lower_bound, comparison.standard_error
    if bound is None or error is None:
        objections.append(
            f"{comparison.documents} audit documents are too few to show a gain over "
            f"{_name(comparison)} at level {share.alpha:.1g}, which is what test {share.test} of "
            "the run has"
        )
    elif bound <= params.minimum_gain:
        objections.append(
            f"no proven gain over {_name(comparison)}: {comparison.gain:+.4f} +- {error:.4f} nats, "
            f"lower bound {bound:+.4f}, {params.minimum_gain:g} needed"
        )
    for name, found in comparison.domains.items():
        loss, error = -found.gain, found.standard_error or 0.0
        if loss - 2 * error > params.domain_tolerance:
            known = f" +- {error:.4f}" if error >= 5e-5 else ""
            objections.append(
                f"domain {name!r} is {loss:.4f}{known} nats worse than {_name(comparison)}, "
                f"{params.domain_tolerance:g} tolerated"
            )
    return objections
