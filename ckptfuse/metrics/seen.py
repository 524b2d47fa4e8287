"""The workspace at one moment, as monitoring sees it: no server and no bucket is asked."""

from dataclasses import dataclass
from functools import cached_property

from ckptfuse.blocks import block_digest
from ckptfuse.looks import Look
from ckptfuse.losses import Estimate, combine
from ckptfuse.protocol import score_key
from ckptfuse.records import AnyRecord, CheckpointRecord, PlanRecord, QuarantineRecord, ScoreRecord
from ckptfuse.service import Service, plans_of
from ckptfuse.steps.look import look_file


@dataclass(frozen=True)
class Seen:
    """Each part is read when it is first asked for."""

    service: Service

    @cached_property
    def look(self) -> Look | None:
        """The last look at the bucket; None before the first."""
        return look_file(self.service).last()

    @cached_property
    def checkpoints(self) -> dict[str, CheckpointRecord]:
        if self.look is not None and self.look.corpus is not None:
            self.service.scorer.assume(self.look.corpus, self.look.tokenizer)
        return self.service.checkpoints()

    @cached_property
    def quarantined(self) -> dict[str, QuarantineRecord]:
        return self.all(QuarantineRecord)

    @cached_property
    def plans(self) -> dict[str, PlanRecord]:
        """Fusion -> the plan that stands for its window."""
        return {plan.fusion: plan for plan in plans_of(self.service).values()}

    def all(self, kind: type[AnyRecord]) -> dict[str, AnyRecord]:
        return self.service.records.all(kind)

    @property
    def queue(self) -> list[tuple[int, float]]:
        """Step and time of the checkpoints that were due, and still are."""
        due = self.look.queue if self.look else ()
        return [(item.step, item.written) for item in due if not self._is_done(item.signature)]

    def _is_done(self, signature: str) -> bool:
        known = self.checkpoints.get(signature)
        if known is None:
            return signature in self.quarantined
        return self.loss(known.fingerprint, known.tokenizer) is not None

    def loss(self, model: str, tokenizer: str) -> float | None:
        """The target loss on report text (nats per token), None where there is none yet.

        On the corpus and by the numerics of the last look: so the corpus need not be read here,
        nor the devices be the same.
        """
        if self.look is None or self.look.corpus is None or self.look.numerics is None:
            return None
        params = self.service.params
        blocks = block_digest(
            corpus=self.look.corpus, tokenizer=tokenizer, split="report", cut=params.scoring.cut
        )
        key = score_key(model_id=model, blocks=blocks, numerics=self.look.numerics)
        record = self.service.records.get(ScoreRecord, key)
        if record is None:
            return None
        weights = {name: domain.weight for name, domain in params.corpus.domains.items()}
        scores = record.domains.items()
        estimates = {name: Estimate(one.loss, 0.0, one.documents) for name, one in scores}
        return combine(estimates, weights).mean
