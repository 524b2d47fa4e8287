"""Weigh: from the scores of a window to its plan, and from the score of its fusion to a better one.

decide_weights    what the rule says before its merge is made: revision 0
review_weights    what it says now that the fusion is scored: it may correct itself
"""

import math
from collections.abc import Sequence

from ckptfuse.deciding import Decision, Evaluator, Recall, decide
from ckptfuse.digests import digest
from ckptfuse.fusion import FusionSpec
from ckptfuse.plan import Fuse
from ckptfuse.protocol import Input, MergeModel
from ckptfuse.records import CheckpointRecord, Member, MergeLoss, PlanRecord
from ckptfuse.resampling import measure
from ckptfuse.rules import Measurement, Observation, get_rule
from ckptfuse.scoring import TokenizerSource
from ckptfuse.service import Service, losses_of, plans_of
from ckptfuse.steps.score import raise_failed
from ckptfuse.steps.spikes import spikes_among
from ckptfuse.window import Window


def evaluator(
    service: Service, members: Sequence[CheckpointRecord], tokenizer: TokenizerSource
) -> Evaluator:
    """Measures merges of a window on the selection text, each made in memory by a scoring job.

    All that are asked for at once share a job; what was measured before starts none.
    """
    recall = recaller(service, members, tokenizer)

    def evaluate(vectors: tuple[tuple[float, ...], ...]) -> list[Measurement]:
        missing = [vector for vector in vectors if recall(vector) is None]
        models = [merge_model(service, members, vector) for vector in missing]
        for answer in service.scorer.score(models, tokenizer, ["selection"]) if models else []:
            raise_failed(answer.failed)
        return [
            _measurement(service, spec_of(service, members, v).id, tokenizer.digest)
            for v in vectors
        ]

    return evaluate


def merge_model(
    service: Service, members: Sequence[CheckpointRecord], weights: Sequence[float]
) -> MergeModel:
    """The merge of a window with these weights, for a scoring job to make in memory."""
    spec = spec_of(service, members, weights)
    inputs = tuple(Input(uri=m.uri, signature=m.signature or None) for m in members)
    return MergeModel(
        fusion=spec.id,
        inputs=inputs,
        weights=spec.weights,
        dtype=spec.recipe.dtype,
        copied=spec.recipe.copied,
        ancillary=inputs[-1],
    )


def recaller(
    service: Service, members: Sequence[CheckpointRecord], tokenizer: TokenizerSource
) -> Recall:
    """Knows a merge's losses from the records, if it was ever scored."""

    def recall(vector: tuple[float, ...]) -> Measurement | None:
        fusion = spec_of(service, members, vector).id
        losses = service.scorer.losses(fusion, tokenizer.digest, "selection")
        return None if losses is None else measure(losses, service.scorer.target_weights)

    return recall


def observe(service: Service, members: Sequence[CheckpointRecord]) -> Observation:
    """Scored checkpoints, oldest first, as a rule sees them."""
    return Observation(
        steps=tuple(member.step for member in members),
        checkpoints=tuple(_measurement(service, m.fingerprint, m.tokenizer) for m in members),
    )


def _measurement(service: Service, model_id: str, tokenizer: str) -> Measurement:
    losses = losses_of(service, model_id, tokenizer, "selection")
    return measure(losses, service.scorer.target_weights)


def spec_of(
    service: Service, members: Sequence[CheckpointRecord | Member], weights: Sequence[float]
) -> FusionSpec:
    return FusionSpec(
        fingerprints=tuple(member.fingerprint for member in members),
        weights=tuple(weights),
        ancillary=members[-1].fingerprint,
        recipe=service.recipe,
    )


def weigh(
    service: Service, window: Window, tokenizer: TokenizerSource, *, to_the_end: bool = False
) -> Decision:
    """The rule's weights for a window whose checkpoints are scored.

    ``to_the_end``: the merge with these weights is measured too, if it was not yet, so that the
    rule has nothing left to learn; otherwise it is heeded if it was.
    """
    evaluate = evaluator(service, window.members, tokenizer)
    return decide(
        get_rule(service.params.rule.name, service.params.rule.options),
        observe(service, window.members),
        evaluate=evaluate,
        recall=(
            (lambda weights: evaluate((weights,))[0])
            if to_the_end
            else recaller(service, window.members, tokenizer)
        ),
    )


def decide_weights(service: Service, item: Fuse) -> PlanRecord:
    """The plan of a window: its members, their weights and the fusion's id.

    A plan that was made before stands for as long as it can be carried out.
    """
    known = plans_of(service).get(item.key)
    if known is not None and _is_possible(service, known, item.window):
        return known
    return _plan(service, item, revision=0 if known is None else known.revision + 1)


def review_weights(service: Service, item: Fuse, decided: PlanRecord) -> PlanRecord:
    """The plan again, now that its fusion is scored; the same weights, unless the rule errs.

    Raises what the evaluation of a merge raises, if the rule asks for one.
    """
    wanted = {member.fingerprint for member in decided.members}
    members = tuple(m for m in item.window.members if m.fingerprint in wanted)
    if decided.is_final or len(members) < len(wanted):
        return decided  # nothing to learn, or a checkpoint that it was decided from is gone
    return _plan(service, Fuse(item.key, Window(members)), revision=decided.revision + 1)


def _plan(service: Service, item: Fuse, *, revision: int) -> PlanRecord:
    members = item.window.members
    tokenizer = service.scorer.tokenizer(item.window.newest.uri)
    decision = weigh(service, item.window, tokenizer)
    answer, losses = decision.answer, decision.seen.losses
    marks = spikes_among(service, members)
    errors = answer.errors or [None] * len(members)
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
                loss=float(loss),
                weight_error=error,
                spike=marks.get(m.fingerprint),
            )
            for m, weight, loss, error in zip(members, answer.weights, losses, errors, strict=True)
        ],
        ancillary=item.window.newest.fingerprint,
        dtype=service.params.fuse.dtype,
        fusion=spec_of(service, members, answer.weights).id,
        notes={name: value for name, value in answer.notes.items() if math.isfinite(value)},
        params=service.params.scientific_digest(),
        revision=revision,
        merges=_merges(decision),
        remarks=list(answer.remarks),
        no_gain=answer.no_gain,
    )
    service.records.put(plan_key(record), record)
    return record


def plan_key(decided: PlanRecord) -> str:
    """What its record is called."""
    revision = [decided.revision] if decided.revision else []
    return digest([decided.window, decided.fusion, *revision])


def _merges(decision: Decision) -> list[MergeLoss]:
    """Every merge that was measured, with what the rule had expected of it."""
    found = []
    for merge in decision.seen.merges:
        expected = decision.answer.predicted.get(merge.weights)
        found.append(
            MergeLoss(
                weights=list(merge.weights),
                predicted=expected.loss if expected else None,
                loss=merge.loss,
                standard_error=expected.error_beside(merge.measured) if expected else None,
            )
        )
    return found


def _is_possible(service: Service, decided: PlanRecord, window: Window) -> bool:
    """Whether it is merged already, or all that it draws from is as it was, and in the window."""
    if service.weights_of(decided.fusion) is not None:
        return True
    weights = [member.weight for member in decided.members]
    if spec_of(service, decided.members, weights).id != decided.fusion:
        return False  # the folder that scoring.model names has changed
    present = {member.fingerprint for member in window.members}
    return all(m.fingerprint in present for m in decided.members if m.weight)
