"""Score: checkpoints as they come, and the fusions made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckptfuse.checkpoints import Checkpoint, config_identity, open_checkpoint
from ckptfuse.errors import CkptfuseError, JobError, NonFiniteValues
from ckptfuse.jobs import ModelScores
from ckptfuse.layouts import read_layout
from ckptfuse.listing import Healthy
from ckptfuse.plan import Quarantine
from ckptfuse.protocol import CheckpointModel, Failed, Input, MergeModel
from ckptfuse.records import CheckpointRecord, PlanRecord
from ckptfuse.scoring import TokenizerSource
from ckptfuse.service import Service
from ckptfuse.steps.look import quarantine
from ckptfuse.tokenizing import tokenizer_files_digest
from ckptfuse.window import generation_of, segment_of


@dataclass(frozen=True, slots=True)
class Unscored:
    """A checkpoint without a score, and why; ``quarantined`` when that is for good."""

    checkpoint: Healthy
    reason: str
    quarantined: bool


def score_checkpoints(service: Service, waiting: Sequence[Healthy]) -> list[Unscored]:
    """Score checkpoints in one job per tokenizer; returns those that could not be."""
    unscored: list[Unscored] = []
    groups: dict[TokenizerSource, list[Checkpoint]] = {}
    for listed in waiting:
        try:
            checkpoint = _with_files(listed)
            source = service.scorer.tokenizer(checkpoint.uri)
        except CkptfuseError as error:
            unscored.append(Unscored(listed, str(error), quarantined=False))
            continue
        known = next((s for s in groups if s.digest == source.digest), source)
        groups.setdefault(known, []).append(checkpoint)
    for source, group in groups.items():
        models = [CheckpointModel(input=Input(uri=c.uri, signature=c.signature)) for c in group]
        try:
            answers = service.scorer.score(models, source)
        except JobError as error:  # whoever starts the jobs was killed
            unscored += [
                Unscored(checkpoint, str(error), quarantined=False) for checkpoint in group
            ]
            continue
        for checkpoint, answer in zip(group, answers, strict=True):
            if answer.failed is not None:
                unscored.append(_not_scored(service, checkpoint, answer.failed))
                continue
            try:
                _remember(service, checkpoint, source, answer)
            except CkptfuseError as error:  # deleted or written again since the job read it
                unscored.append(Unscored(checkpoint, str(error), quarantined=False))
    return unscored


def _with_files(listed: Healthy) -> Checkpoint:
    """Raises MissingFile or ChangedCheckpoint where a record remembers what is no longer there."""
    if isinstance(listed, Checkpoint):
        return listed
    found = open_checkpoint(listed.uri, listed.signature)
    # What its name says was read by a pattern that may be a team's own.
    return replace(found, step=listed.step, stage=listed.stage, tokens=listed.tokens)


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
    is_given = service.scorer.given_tokenizer is not None
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
        own_tokenizer=(
            tokenizer_files_digest(checkpoint.store()) if is_given else tokenizer.digest
        ),
        segment=segment_of(
            stage=checkpoint.stage,
            config=config,
            tokenizer=tokenizer.digest,
            architecture=answer.architecture,
        ),
        generation=generation_of(checkpoint, answer.fingerprint, known),
    )
    service.records.put(checkpoint.signature, record)
    _check_scored_by(service, checkpoint, tokenizer)


def _check_scored_by(service: Service, checkpoint: Checkpoint, tokenizer: TokenizerSource) -> None:
    """Raise where the record that stands says another: each look would score it again."""
    stands = service.records.all(CheckpointRecord)[checkpoint.signature]
    if service.scorer.tokenizer_of(stands) != tokenizer.digest:
        raise CkptfuseError(
            f"{checkpoint.uri} was first scored with a tokenizer that parameters named, by a "
            "version that did not note its own: name that one again (corpus.tokenizer), or remove "
            f"records/{CheckpointRecord.kind}/{checkpoint.signature}.json"
        )


def score_fusion(service: Service, decided: PlanRecord, folder: Path) -> None:
    """Score the merged model in ``folder`` on every split, under the fusion's id."""
    if service.scorer.is_scored(decided.fusion, decided.tokenizer):
        return
    tokenizer = service.scorer.tokenizer(str(folder))
    source = Input(uri=str(folder))
    model = MergeModel(
        fusion=decided.fusion,
        inputs=(source,),
        weights=(1.0,),
        dtype=None,
        ancillary=source,
        converted=service.params.scoring.model is not None,
    )
    (answer,) = service.scorer.score([model], tokenizer)
    raise_failed(answer.failed)


def raise_failed(failed: Failed | None) -> None:
    if failed is None:
        return
    if failed.error == "non-finite":
        raise NonFiniteValues(failed.reason, checkpoint=failed.checkpoint or "")
    raise CkptfuseError(failed.reason)
