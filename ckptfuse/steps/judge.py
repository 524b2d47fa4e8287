"""Judge: from the scores of a fusion to the gate's verdict."""

from typing import Literal

from ckptfuse import gate
from ckptfuse.records import GateRecord, Member, PlanRecord
from ckptfuse.service import Service, losses_of


def judge_fusion(service: Service, decided: PlanRecord) -> GateRecord:
    """The gate's verdict on a fusion that has its scores."""
    best, newest = gate.best_member(decided.members), decided.members[-1]
    params = service.params.gate
    key = gate.gate_key(
        window=decided.window,
        fusion=decided.fusion,
        audit_blocks=service.scorer.block_digest(decided.tokenizer, "audit"),
        params=params,
        members={"best": best.fingerprint, "newest": newest.fingerprint},
    )
    known = service.records.get(GateRecord, key)
    if known is not None:
        return known
    verdict = verdict_on(service, decided, share=_share(service, decided.window))
    service.records.put(key, verdict)
    return verdict


def _share(service: Service, window: str) -> gate.Share:
    """What a window's test may spend; judged again, it is no new test."""
    verdicts = sorted(service.records.all(GateRecord).values(), key=lambda v: v.test)
    published: dict[str, bool] = {}
    for verdict in (verdict for verdict in verdicts if verdict.test):
        if verdict.window == window:
            break
        passed = verdict.verdict == "publish"
        published[verdict.window] = published.get(verdict.window, True) and passed
    return gate.next_share(service.params.gate.alpha, list(published.values()))


def verdict_on(service: Service, decided: PlanRecord, *, share: gate.Share) -> GateRecord:
    """Judge from recorded audit scores; ``share`` is the chance to err that it has."""
    params = service.params.gate
    about = {"window": decided.window, "fusion": decided.fusion, "step": decided.step}
    if not decided.is_merge:
        reason = decided.no_gain or _all_on_one(decided)
        return gate.decline_unmerged(**about, reason=reason)  # type: ignore[arg-type]
    fusion = losses_of(service, decided.fusion, decided.tokenizer, "audit")
    comparisons = []
    opponents: dict[Literal["best", "newest"], Member] = {
        "best": gate.best_member(decided.members),
        "newest": decided.members[-1],
    }
    for against, member in opponents.items():
        losses = losses_of(service, member.fingerprint, decided.tokenizer, "audit")
        comparisons.append(
            gate.compare(
                fusion,
                gate.Opponent(against, member, losses),
                weights=service.scorer.target_weights,
                alpha=share.alpha,
            )
        )
    return gate.judge(**about, share=share, params=params, comparisons=comparisons)  # type: ignore[arg-type]


def _all_on_one(decided: PlanRecord) -> str:
    (single,) = (member for member in decided.members if member.weight)
    return (
        f"the rule puts all weight on step {single.step} ({single.name}): averaging gains nothing "
        "here, as at the end of a learning-rate decay"
    )
