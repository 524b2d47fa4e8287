"""What every step of the pipeline needs: one trajectory's parameters, workspace and losses."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ckptfuse.conversion import made_by
from ckptfuse.corpus import Split
from ckptfuse.errors import RecordError
from ckptfuse.fusion import Recipe
from ckptfuse.jobs import Here, Runner
from ckptfuse.losses import Losses
from ckptfuse.params import Params
from ckptfuse.record_files import Records
from ckptfuse.records import CheckpointRecord, FusionRecord, GateRecord, Member, PlanRecord
from ckptfuse.rules import get_rule
from ckptfuse.scoring import Scorer
from ckptfuse.store import open_store, throttle
from ckptfuse.workspace import Workspace

Placed = TypeVar("Placed", CheckpointRecord, Member)


@dataclass(frozen=True)
class Service:
    """One trajectory's parameters and workspace: what every step needs."""

    params: Params
    workspace: Workspace
    runner: Runner = field(default_factory=Here)  # of scoring requests

    @cached_property
    def records(self) -> Records:
        return self.workspace.records

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.params, self.records, self.workspace.folder("cache"), self.runner)

    @cached_property
    def bucket(self) -> str | None:
        """The bucket's URI without a slash at its end; None for a service that has none."""
        return None if not self.params.bucket else open_store(self.params.bucket).uri.rstrip("/")

    @cached_property
    def recipe(self) -> Recipe:
        """How merges are made; asked for every one that a rule thinks of."""
        fuse, scoring = self.params.fuse, self.params.scoring
        converted = None if scoring.model is None else made_by(scoring.converter, scoring.model)
        return Recipe(dtype=fuse.dtype, copied=fuse.copied, strict=fuse.strict, converted=converted)

    def placed(self, checkpoint: Placed) -> Placed:
        """The checkpoint where it lies now: a record names the place where it was first read."""
        uri = f"{self.bucket}/{checkpoint.name}"
        if self.bucket is None or checkpoint.uri == uri:
            return checkpoint
        return checkpoint.model_copy(update={"uri": uri})

    def checkpoints(self) -> dict[str, CheckpointRecord]:
        """Signature -> what was ever read, where it lies and with what tokenizer it is scored now.

        Raises CorpusError where the tokenizer that parameters name is not there.
        """
        return {
            signature: self._scored_now(self.placed(record))
            for signature, record in self.records.all(CheckpointRecord).items()
        }

    def _scored_now(self, record: CheckpointRecord) -> CheckpointRecord:
        tokenizer = self.scorer.tokenizer_of(record)
        if tokenizer == record.tokenizer:
            return record
        return record.model_copy(update={"tokenizer": tokenizer})

    def weights_of(self, fusion: str) -> Path | None:
        """The folder of a merged model; None where it is not (any more, or completely) here."""
        folder = self.workspace.model(fusion)
        return folder if self.records.has(FusionRecord, fusion) and folder.is_dir() else None

    def __reduce__(self) -> tuple[Callable[..., "Service"], tuple[Params, Runner]]:
        """Sent to a task in another process, it is opened there anew, with its caps on reading."""
        return open_service, (self.params, self.runner)


def open_service(params: Params, runner: Runner | None = None) -> Service:
    """The trajectory of these parameters, in its workspace, as ``open_in``.

    Raises ConfigurationError when that is another trajectory's.
    """
    workspace = Workspace(Path(params.workspace), params.trajectory)
    workspace.check_trajectory()
    return open_in(workspace, params, runner)


def open_in(workspace: Workspace, params: Params, runner: Runner | None = None) -> Service:
    """What these parameters say, in any workspace; this process keeps to their ``reading``.

    ``runner`` carries out its scoring requests, in place of this machine.
    """
    get_rule(params.rule.name, params.rule.options)  # a wrong rule is told before any work
    throttle.configure(params.reading.limits(), own=workspace.read_freely)
    return Service(params, workspace, runner or Here())


def target_loss(service: Service, losses: Losses) -> float:
    return losses.target(service.scorer.target_weights).mean


def losses_of(service: Service, model_id: str, tokenizer: str, split: Split) -> Losses:
    """Recorded losses; raises RecordError when the model was not scored on this split."""
    found = service.scorer.losses(model_id, tokenizer, split)
    if found is None:
        raise RecordError(f"model {model_id[:16]} has no score on the {split} split")
    return found


def plans_of(service: Service) -> dict[str, PlanRecord]:
    """Window -> its plan.

    A window has more than one when its rule corrected itself, or a checkpoint vanished before it
    could be merged: the last revision counts, once there is a verdict that of the fusion judged.
    """
    judged = {verdict.fusion for verdict in service.records.all(GateRecord).values()}
    plans = service.records.all(PlanRecord).values()
    ordered = sorted(plans, key=lambda plan: (plan.fusion in judged, plan.revision))
    return {plan.window: plan for plan in ordered}
