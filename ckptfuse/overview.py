"""A trajectory at a glance: the rows of ``status``, report and demo.

From the records, what the last look left, and the corpus's digest; present.py says what where the
corpus cannot be read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ckptfuse.corpus import Split
from ckptfuse.curves import first_reached
from ckptfuse.gate import best_member
from ckptfuse.looks import Look
from ckptfuse.promotion import champion, waiting
from ckptfuse.published import in_order_of_publication
from ckptfuse.records import (
    CheckpointRecord,
    CorpusRecord,
    GateRecord,
    PlanRecord,
    PromotionRecord,
    PublicationRecord,
    QuarantineRecord,
    RetirementRecord,
    SkipRecord,
)
from ckptfuse.service import Service, plans_of
from ckptfuse.steps.look import look_file
from ckptfuse.steps.spikes import spikes_among
from ckptfuse.steps.survey import known_survey
from ckptfuse.window import in_order, window_key, windows

#: What a published fusion is called: before its veto is heard, as the champion, as one that is
#: not; and when its version was deleted.
AVAILABLE = frozenset(["candidate", "champion", "published"])
PUBLISHED = AVAILABLE | {"retired"}


@dataclass(frozen=True, slots=True)
class Row:
    """One checkpoint and the window that ends at it. Losses are of one split, in nats."""

    name: str
    step: int
    loss: float | None
    best_single: float | None = None  # of the window, as selection text finds it
    fused: float | None = None
    gain: float | None = None  # over the best single checkpoint
    verdict: str = ""
    reason: str = ""
    plan: PlanRecord | None = None
    spike: float | None = None  # nats above the trend on selection text, where it leaves it


@dataclass(frozen=True)
class Overview:
    rows: tuple[Row, ...]
    quarantined: tuple[QuarantineRecord, ...]
    champion: PromotionRecord | None
    publications: tuple[PublicationRecord, ...]
    corpus: CorpusRecord | None  # None before the first look
    look: Look | None  # the last one


def overview(service: Service, split: Split = "report") -> Overview:
    """Read the records; ``split`` is where the losses are quoted from."""
    records = service.records
    plans = plans_of(service)
    gates = {gate.window: gate for gate in records.all(GateRecord).values()}
    latest = _latest(plans.values(), gates)
    skips = records.all(SkipRecord)
    science, corpus = service.params.scientific_digest(), service.scorer.corpus_digest()
    publications = {p.window: p for p in records.all(PublicationRecord).values()}
    retired = records.keys(RetirementRecord)
    present = champion(service)
    words = dict.fromkeys((p.fusion for p in waiting(service)), "candidate")
    words |= dict.fromkeys(retired, "retired")
    if present is not None:
        words[present.fusion] = "champion"
    rows: list[Row] = []
    ordered = in_order(service.checkpoints().values())
    marks = spikes_among(service, ordered)
    single = service.params.window.model_copy(update={"minimum": 1})  # best single: of any number
    for window in windows(ordered, single):
        checkpoint, key = window.newest, window_key(window.newest, science, corpus)
        plan = plans.get(key)
        if plan is None:  # decided under other parameters, and not again?
            before = latest.get((checkpoint.fingerprint, checkpoint.step))
            if before is not None and (key not in skips or before.window in publications):
                plan = before
        row = Row(
            checkpoint.name,
            checkpoint.step,
            loss=service.scorer.target(checkpoint.fingerprint, checkpoint.tokenizer, split),
            best_single=_best_single(service, window.members, split),
            spike=marks.get(checkpoint.fingerprint),
        )
        if plan is not None:
            is_published = plan.window in publications or plan.fusion in retired
            word = words.get(plan.fusion, "published") if is_published else None
            row = _with_plan(service, row, plan, gates.get(plan.window), word, split)
        elif key in skips:
            row = replace(row, verdict="skipped", reason=skips[key].reason)
        rows.append(row)
    return Overview(
        rows=tuple(rows),
        quarantined=tuple(records.all(QuarantineRecord).values()),
        champion=present,
        publications=tuple(in_order_of_publication(service, publications.values())),
        corpus=known_survey(service),
        look=look_file(service).last(),
    )


def _latest(
    plans: Iterable[PlanRecord], gates: Mapping[str, GateRecord]
) -> dict[tuple[str, int], PlanRecord]:
    """Of each newest checkpoint (its fingerprint and step) the plan that was tested last."""
    tested = sorted(plans, key=lambda p: gates[p.window].test if p.window in gates else 0)
    return {(plan.ancillary, plan.step): plan for plan in tested}


def _best_single(
    service: Service, members: Sequence[CheckpointRecord], split: Split
) -> float | None:
    """The loss of the checkpoint that selection text finds best."""
    chosen = [(service.scorer.target(m.fingerprint, m.tokenizer, "selection"), m) for m in members]
    known = [(loss, member) for loss, member in chosen if loss is not None]
    if not known:
        return None
    _, best = min(known, key=lambda pair: pair[0])
    return service.scorer.target(best.fingerprint, best.tokenizer, split)


def _with_plan(
    service: Service,
    row: Row,
    plan: PlanRecord,
    verdict: GateRecord | None,
    published: str | None,  # in a word, where it is
    split: Split,
) -> Row:
    best = service.scorer.target(best_member(plan.members).fingerprint, plan.tokenizer, split)
    fused = service.scorer.target(plan.fusion, plan.tokenizer, split)
    word = "deciding"
    if verdict is not None:
        word = verdict.verdict if verdict.verdict == "declined" else "publishing"
    return replace(
        row,
        best_single=best,
        fused=fused,
        gain=best - fused if best is not None and fused is not None else None,
        verdict=published or word,
        reason=verdict.reason if verdict else "",
        plan=plan,
    )


def steps_saved(rows: Sequence[Row]) -> list[int | None]:
    """Of each row's fusion: further steps until the raw trajectory first reaches its loss.

    ``rows`` in the order of training. None without a fusion, or if it has not been reached.
    """
    return [_steps_saved(row, islice(rows, number, None)) for number, row in enumerate(rows)]


def _steps_saved(fused: Row, later: Iterable[Row]) -> int | None:
    if fused.fused is None:
        return None
    curve = ((r.step, r.loss) for r in later if r.loss is not None and r.step >= fused.step)
    reached = first_reached(curve, fused.fused)
    return None if reached is None else round(reached) - fused.step
