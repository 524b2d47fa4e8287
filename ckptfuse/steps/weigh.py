"""Weigh: from the scores of a window to its plan."""

import math
from collections.abc import Sequence
from pathlib import Path

from ckptfuse.deciding import Evaluator, decide
from ckptfuse.digests import digest
from ckptfuse.fusion import FusionSpec, Recipe
from ckptfuse.params import FuseParams
from ckptfuse.plan import Fuse
from ckptfuse.protocol import Input, MergeModel
from ckptfuse.records import CheckpointRecord, FusionRecord, Member, PlanRecord
from ckptfuse.rules import Weights, get_rule
from ckptfuse.scoring import TokenizerSource
from ckptfuse.service import Service, losses_of, plans_of, target_loss
from ckptfuse.steps.score import raise_failed
from ckptfuse.window import Window


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
                dtype=spec.recipe.dtype,
                copied=spec.recipe.copied,
                ancillary=inputs[-1],
            )
            for spec in specs
        ]
        for answer in service.scorer.score(models, tokenizer, ["selection"]):
            raise_failed(answer.failed)
        return [
            target_loss(service, losses_of(service, spec.id, tokenizer.digest, "selection"))
            for spec in specs
        ]

    return evaluate


def recipe_of(params: FuseParams) -> Recipe:
    return Recipe(dtype=params.dtype, copied=params.copied, strict=params.strict)


def spec_of(
    service: Service, members: Sequence[CheckpointRecord | Member], weights: Sequence[float]
) -> FusionSpec:
    return FusionSpec(
        fingerprints=tuple(member.fingerprint for member in members),
        weights=tuple(weights),
        ancillary=members[-1].fingerprint,
        recipe=recipe_of(service.params.fuse),
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
    """The plan of a window: its members, their weights and the fusion's id.

    A plan that was made before stands for as long as it can be carried out.
    """
    known = plans_of(service).get(item.key)
    if known is not None and _is_possible(service, known, item.window):
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
    service.records.put(digest([item.key, record.fusion]), record)
    return record


def _is_possible(service: Service, decided: PlanRecord, window: Window) -> bool:
    """Whether it is merged already, or all that it draws from is still in the window."""
    merged = service.records.get(FusionRecord, decided.fusion)
    if merged is not None and Path(merged.folder).is_dir():
        return True
    present = {member.fingerprint for member in window.members}
    return all(m.fingerprint in present for m in decided.members if m.weight)
