"""Fusions in the order of training, judged by the gate as the service does."""

from collections.abc import Sequence
from typing import Any, Literal

from ckptfuse.gate import Opponent, Share, best_member, compare, judge, next_share
from ckptfuse.losses import combine
from ckptfuse.records import CheckpointRecord, GateRecord, Member
from ckptfuse.service import Service, losses_of
from ckptfuse.study import IN, Case, Place, Study
from ckptfuse.study.measure import Bench
from ckptfuse.window import Window

Name = Literal["best", "newest"]


def gated(
    service: Service, study: Study, pairs: Sequence[tuple[Place, Window]]
) -> list[dict[str, Any]]:
    """What became of the fusions of `calibrated` over one window length.

    What is published is measured again on report text, which judged nothing.
    """
    items: list[dict[str, Any]] = []
    published: list[bool] = []
    for place, window in pairs:
        case = place.case("calibrated")
        item: dict[str, Any] = {"step": place.step, "kind": place.kind, "verdict": "declined"}
        items.append(item)
        if case.no_gain is not None or case.merged == 1:
            item["reason"] = case.no_gain or "all weight is on one checkpoint"
            continue
        bench = Bench(service, window.members)
        opponents = _opponents(window, bench)
        share = next_share(service.params.gate.alpha, published)
        verdict = _judge(service, place, case, bench, opponents, share)
        published.append(verdict.verdict == "publish")
        item |= {"test": share.test, "verdict": verdict.verdict, "reason": verdict.reason}
        item["audit"] = {
            c.against: {"mean": c.gain, "standard_error": c.standard_error}
            for c in verdict.comparisons
        }
        if published[-1]:
            item["report"] = _on_report(service, study, case, bench, opponents)
    return items


def _opponents(window: Window, bench: Bench) -> dict[Name, Member]:
    pairs = zip(window.members, bench.seen.losses.tolist(), strict=True)
    members = [_member(record, loss) for record, loss in pairs]
    return {"best": best_member(members), "newest": members[-1]}


def _judge(
    service: Service,
    place: Place,
    case: Case,
    bench: Bench,
    opponents: dict[Name, Member],
    share: Share,
) -> GateRecord:
    digest, weights = bench.tokenizer.digest, service.scorer.target_weights
    comparisons = []
    for name, member in opponents.items():
        losses = losses_of(service, member.fingerprint, digest, "audit")
        opponent = Opponent(name, member, losses)
        comparisons.append(compare(case.losses, opponent, weights=weights, alpha=share.alpha))
    return judge(
        window=str(place.step),
        fusion=bench.model(case.weights),
        step=place.step,
        share=share,
        params=service.params.gate,
        comparisons=comparisons,
    )


def _on_report(
    service: Service, study: Study, case: Case, bench: Bench, opponents: dict[Name, Member]
) -> dict[str, Any]:
    """The gains over the same checkpoints."""
    bench.score([case.weights], ("report",))
    digest = bench.tokenizer.digest
    fused = losses_of(service, bench.model(case.weights), digest, "report")
    gains: dict[str, Any] = {}
    for name, member in opponents.items():
        theirs = losses_of(service, member.fingerprint, digest, "report")
        found = combine(theirs.minus(fused), study.views[IN])
        gains[name] = {"mean": found.mean, "standard_error": found.standard_error}
    return gains


def _member(record: CheckpointRecord, loss: float) -> Member:
    return Member(
        name=record.name,
        uri=record.uri,
        step=record.step,
        signature=record.signature,
        fingerprint=record.fingerprint,
        weight=0.0,
        loss=loss,
    )
