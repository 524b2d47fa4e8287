"""Which scored checkpoints left the trajectory's trend, by the records."""

from collections.abc import Iterable
from functools import cache

from ckptfuse.records import CheckpointRecord
from ckptfuse.service import Service
from ckptfuse.spikes import HISTORY, excess_over_trend
from ckptfuse.window import lineages


def spikes_among(service: Service, checkpoints: Iterable[CheckpointRecord]) -> dict[str, float]:
    """Fingerprint -> nats above the trend on selection text, of those that are spikes.

    The trend is that of all scored ancestors in the segment, whatever the window.
    """

    @cache
    def loss(fingerprint: str, tokenizer: str) -> float | None:
        return service.scorer.target(fingerprint, tokenizer, "selection")

    wanted = {checkpoint.fingerprint for checkpoint in checkpoints}
    known = service.checkpoints().values()
    found = {}
    for line in lineages(known, service.params.window.boundaries):
        if line[-1].fingerprint not in wanted:
            continue
        scored = [(m.step, loss(m.fingerprint, m.tokenizer)) for m in line[-HISTORY - 1 :]]
        steps = [step for step, value in scored if value is not None]
        losses = [value for _, value in scored if value is not None]
        excess = excess_over_trend(steps, losses) if scored[-1][1] is not None else None
        if excess is not None:
            found[line[-1].fingerprint] = excess
    return found
