"""The steps of the pipeline, each from records to records.

Every step asks first whether its record is there; so it can be repeated, and killed anywhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from ckptfuse import checkpoints, gate
from ckptfuse.checkpoints import (
    Checkpoint,
    Contents,
    Conventions,
    Listing,
    config_identity,
    open_checkpoint,
    read_layout,
)
from ckptfuse.corpus import Split
from ckptfuse.deciding import Evaluator, decide
from ckptfuse.errors import CkptfuseError, JobError, NonFiniteValues, RecordError
from ckptfuse.fusion import FusionSpec
from ckptfuse.losses import Losses
from ckptfuse.params import Params
from ckptfuse.plan import Actions, Fuse, Quarantine, Skip, State, plan
from ckptfuse.protocol import CheckpointModel, Event, Failed, Input, MergeModel
from ckptfuse.records import (
    CheckpointRecord,
    FusionRecord,
    GateRecord,
    Member,
    PlanRecord,
    PublicationRecord,
    QuarantineRecord,
    Records,
    SkipRecord,
)
from ckptfuse.rules import Weights, get_rule
from ckptfuse.scoring import ModelScores, Scorer, TokenizerSource
from ckptfuse.store import FolderStore, open_store, remove_folder
from ckptfuse.window import Window, generation_of, segment_of
from ckptfuse.workspace import Workspace

Listener = Callable[[Event], None]


def _deaf(event: Event) -> None:
    pass


@dataclass(frozen=True)
class Service:
    """One trajectory's parameters and workspace: what every step needs."""

    params: Params
    workspace: Workspace

    @cached_property
    def records(self) -> Records:
        return self.workspace.records

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.params, self.records, self.workspace.folder("cache"))


def open_service(params: Params) -> Service:
    get_rule(params.rule.name, params.rule.options)  # a wrong rule is told before any work
    return Service(params, Workspace(Path(params.workspace)))


# -- looking -----------------------------------------------------------------------------------


def discover(service: Service) -> Listing:
    """List the bucket; headers are read only of checkpoints that no record remembers."""
    watch = service.params.watch
    bucket = open_store(checkpoints.check_bucket_uri(service.params.bucket))
    known = (
        service.records.all(CheckpointRecord).keys() | service.records.all(QuarantineRecord).keys()
    )
    conventions = Conventions(watch.pattern, watch.marker, watch.settle_seconds, known)
    return checkpoints.find(bucket, conventions)


def load_state(service: Service, held: frozenset[str] = frozenset()) -> State:
    """What the records say now; ``held`` are signatures to leave alone in this run."""
    records, scorer = service.records, service.scorer
    known = records.all(CheckpointRecord)
    scored = (s for s, r in known.items() if scorer.is_scored(r.fingerprint, r.tokenizer))
    return State(
        corpus=scorer.corpus_digest(),
        checkpoints=known,
        scored=frozenset(scored),
        held=held,
        quarantined=records.all(QuarantineRecord),
        plans=records.all(PlanRecord),
        gates={gate.window: gate for gate in records.all(GateRecord).values()},
        skips=records.all(SkipRecord),
        publications={p.window: p for p in records.all(PublicationRecord).values()},
    )


def next_actions(
    service: Service, listing: Listing, held: frozenset[str], *, live: bool
) -> Actions:
    return plan(listing, load_state(service, held), service.params, live=live)


# -- scoring -----------------------------------------------------------------------------------


def quarantine(service: Service, item: Quarantine) -> None:
    checkpoint = item.checkpoint
    record = QuarantineRecord(
        name=checkpoint.name,
        uri=checkpoint.uri,
        step=checkpoint.step,
        signature=checkpoint.signature,
        architecture=item.architecture,
        reason=item.reason,
    )
    service.records.put(checkpoint.signature, record)


@dataclass(frozen=True, slots=True)
class Unscored:
    """A checkpoint without a score, and why; ``quarantined`` when that is for good."""

    checkpoint: Checkpoint
    reason: str
    quarantined: bool


def score_checkpoints(
    service: Service, waiting: Sequence[Checkpoint], listener: Listener = _deaf
) -> list[Unscored]:
    """Score checkpoints in one job per tokenizer; returns those that could not be."""
    unscored: list[Unscored] = []
    groups: dict[TokenizerSource, list[Checkpoint]] = {}
    for checkpoint in waiting:
        try:
            source = service.scorer.tokenizer(checkpoint.uri)
        except CkptfuseError as error:
            unscored.append(Unscored(checkpoint, str(error), quarantined=False))
            continue
        known = next((s for s in groups if s.digest == source.digest), source)
        groups.setdefault(known, []).append(checkpoint)
    for source, group in groups.items():
        models = [CheckpointModel(input=Input(uri=c.uri, signature=c.signature)) for c in group]
        answers = service.scorer.score(models, source, progress=listener)
        for checkpoint, answer in zip(group, answers, strict=True):
            if answer.failed is not None:
                unscored.append(_not_scored(service, checkpoint, answer.failed))
            else:
                _remember(service, checkpoint, source, answer)
    return unscored


def _not_scored(service: Service, checkpoint: Checkpoint, failed: Failed) -> Unscored:
    for_good = failed.error in ("non-finite", "damaged")
    if for_good:
        quarantine(service, Quarantine(checkpoint, None, failed.reason))
    return Unscored(checkpoint, failed.reason, quarantined=for_good)


def _remember(
    service: Service, checkpoint: Checkpoint, tokenizer: TokenizerSource, answer: ModelScores
) -> None:
    if answer.fingerprint is None or answer.architecture is None:
        raise JobError(f"{checkpoint.uri}: the scoring job scored it without saying what it read")
    config = config_identity(read_layout(checkpoint).config)
    known = service.records.all(CheckpointRecord).values()
    record = CheckpointRecord(
        name=checkpoint.name,
        uri=checkpoint.uri,
        step=checkpoint.step,
        stage=checkpoint.stage,
        tokens=checkpoint.tokens,
        modified=checkpoint.modified,
        size=checkpoint.size,
        signature=checkpoint.signature,
        fingerprint=answer.fingerprint,
        architecture=answer.architecture,
        tokenizer=tokenizer.digest,
        segment=segment_of(
            stage=checkpoint.stage,
            config=config,
            tokenizer=tokenizer.digest,
            architecture=answer.architecture,
        ),
        generation=generation_of(checkpoint, answer.fingerprint, known),
    )
    service.records.put(checkpoint.signature, record)


def target_loss(service: Service, losses: Losses) -> float:
    return losses.target(service.scorer.target_weights).mean


def losses_of(service: Service, model_id: str, tokenizer: str, split: Split) -> Losses:
    """Recorded losses; raises RecordError when the model was not scored on this split."""
    found = service.scorer.losses(model_id, tokenizer, split)
    if found is None:
        raise RecordError(f"model {model_id[:16]} has no score on the {split} split")
    return found


# -- deciding ----------------------------------------------------------------------------------


def evaluator(
    service: Service, members: Sequence[CheckpointRecord], tokenizer: TokenizerSource
) -> Evaluator:
    """Measures merges of a window on the selection text, each made in memory by a scoring job."""

    def evaluate(vectors: tuple[tuple[float, ...], ...]) -> list[float]:
        specs = [spec_of(service, members, vector) for vector in vectors]
        inputs = tuple(Input(uri=m.uri, signature=m.signature or None) for m in members)
        models = [
            MergeModel(
                fusion=spec.id,
                inputs=inputs,
                weights=spec.weights,
                dtype=spec.dtype,
                ancillary=inputs[-1],
            )
            for spec in specs
        ]
        for answer in service.scorer.score(models, tokenizer, ["selection"]):
            _raise_failed(answer.failed)
        return [
            target_loss(service, losses_of(service, spec.id, tokenizer.digest, "selection"))
            for spec in specs
        ]

    return evaluate


def _raise_failed(failed: Failed | None) -> None:
    if failed is None:
        return
    if failed.error == "non-finite":
        raise NonFiniteValues(failed.reason, checkpoint=failed.checkpoint or "")
    raise CkptfuseError(failed.reason)


def spec_of(
    service: Service, members: Sequence[CheckpointRecord | Member], weights: Sequence[float]
) -> FusionSpec:
    return FusionSpec(
        fingerprints=tuple(member.fingerprint for member in members),
        weights=tuple(weights),
        ancillary=members[-1].fingerprint,
        dtype=service.params.fuse.dtype,
    )


def weigh(
    service: Service, window: Window, losses: Sequence[float], tokenizer: TokenizerSource
) -> Weights:
    """The rule's weights for a window whose selection losses are known."""
    rule = get_rule(service.params.rule.name, service.params.rule.options)
    return decide(
        rule,
        steps=[member.step for member in window.members],
        losses=losses,
        evaluate=evaluator(service, window.members, tokenizer),
    )


def decide_weights(service: Service, item: Fuse) -> PlanRecord:
    """The plan of a window: its members, their weights and the fusion's id."""
    known = service.records.get(PlanRecord, item.key)
    if known is not None:
        return known
    members = item.window.members
    tokenizer = service.scorer.tokenizer(item.window.newest.uri)
    losses = [
        target_loss(service, losses_of(service, m.fingerprint, m.tokenizer, "selection"))
        for m in members
    ]
    answer = weigh(service, item.window, losses, tokenizer)
    record = PlanRecord(
        window=item.key,
        step=item.window.step,
        rule=service.params.rule.name,
        tokenizer=tokenizer.digest,
        members=[
            Member(
                name=m.name,
                uri=m.uri,
                step=m.step,
                signature=m.signature,
                fingerprint=m.fingerprint,
                weight=weight,
                loss=loss,
            )
            for m, weight, loss in zip(members, answer.weights, losses, strict=True)
        ],
        ancillary=item.window.newest.fingerprint,
        dtype=service.params.fuse.dtype,
        fusion=spec_of(service, members, answer.weights).id,
        notes={name: value for name, value in answer.notes.items() if math.isfinite(value)},
        params=service.params.scientific_digest(),
    )
    service.records.put(item.key, record)
    return record


# -- merging and judging -----------------------------------------------------------------------


def merge_fusion(service: Service, decided: PlanRecord) -> FusionRecord:
    """The fusion's folder in the workspace, complete."""
    known = service.records.get(FusionRecord, decided.fusion)
    if known is not None and Path(known.folder).is_dir():
        return known
    folder = service.workspace.model(decided.fusion)
    remove_folder(folder)  # merged, but not yet recorded, by a run that was killed
    spec = spec_of(service, decided.members, [m.weight for m in decided.members])
    opened = [open_checkpoint(m.uri, m.signature) for m in decided.members]
    files = make_fusion(spec, opened, folder)
    record = FusionRecord(
        fusion=decided.fusion,
        step=decided.step,
        folder=str(folder),
        size=sum(size for size, _ in files.values()),
        files=files,
    )
    service.records.put(decided.fusion, record)
    return record


def make_fusion(spec: FusionSpec, members: Sequence[Checkpoint], folder: Path) -> Contents:
    """Merge into a local folder. ``members`` are all of ``spec``'s, the ancillary one last."""
    from ckptfuse.merge import open_inputs, write_fusion  # torch, which most steps do without

    used = [c for c, weight in zip(members, spec.weights, strict=True) if weight]
    inputs = open_inputs(used, members[-1], spec.dtype)
    return write_fusion(inputs, spec.narrowed(), FolderStore(folder))


def score_fusion(
    service: Service, decided: PlanRecord, fusion: FusionRecord, listener: Listener = _deaf
) -> None:
    """Score the merged folder on every split, as any other model, under the fusion's id."""
    if service.scorer.is_scored(decided.fusion, decided.tokenizer):
        return
    tokenizer = service.scorer.tokenizer(fusion.folder)
    source = Input(uri=fusion.folder)
    model = MergeModel(
        fusion=decided.fusion, inputs=(source,), weights=(1.0,), dtype=None, ancillary=source
    )
    (answer,) = service.scorer.score([model], tokenizer, progress=listener)
    _raise_failed(answer.failed)


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
    earlier = {g.window for g in service.records.all(GateRecord).values()} - {decided.window}
    verdict = verdict_on(service, decided, test=len(earlier) + 1)
    service.records.put(key, verdict)
    return verdict


def verdict_on(service: Service, decided: PlanRecord, *, test: int) -> GateRecord:
    """Judge from recorded audit scores; ``test`` is the ordinal that sets the share of alpha."""
    params = service.params.gate
    about = {"window": decided.window, "fusion": decided.fusion, "step": decided.step}
    weighted = [member for member in decided.members if member.weight]
    if len(weighted) == 1:
        return gate.decline_single(**about, test=test, params=params, member=weighted[0])  # type: ignore[arg-type]
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
                alpha=gate.spent_alpha(params.alpha, test),
            )
        )
    return gate.judge(**about, test=test, params=params, comparisons=comparisons)  # type: ignore[arg-type]


def skip(service: Service, item: Skip) -> None:
    service.records.put(
        item.window, SkipRecord(window=item.window, step=item.step, reason=item.reason)
    )
