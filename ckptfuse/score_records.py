"""From the losses of blocks to a score record."""

import math

import numpy as np
from numpy.typing import NDArray

from ckptfuse.blocks import Blocks
from ckptfuse.losses import Losses, bits_per_byte, perplexity
from ckptfuse.protocol import Numerics, score_key
from ckptfuse.record_files import Arrays, Records
from ckptfuse.records import DomainScore, ScoreRecord


def is_recorded(records: Records, *, model_id: str, blocks: str, numerics: Numerics) -> bool:
    key = score_key(model_id=model_id, blocks=blocks, numerics=numerics)
    return records.has(ScoreRecord, key)


def write_score(
    records: Records,
    losses: Losses,
    *,
    model_id: str,
    split: str,
    numerics: Numerics,
    batch_tokens: int,
    compiled: bool,
) -> None:
    """Write the score record of one model on one set of blocks."""
    record = ScoreRecord(
        model=model_id,
        blocks=losses.blocks,
        split=split,
        numerics=numerics.key,
        batch_tokens=batch_tokens,
        compiled=compiled,
        domains=summarise(losses),
    )
    arrays: Arrays = {
        "nll": losses.nll,
        "tokens": losses.tokens,
        "bytes": losses.bytes,
        "domain": losses.domain,
        "document": losses.document,
    }
    key = score_key(model_id=model_id, blocks=losses.blocks, numerics=numerics)
    records.put(key, record, arrays)


def losses_from(blocks: Blocks, nll: NDArray[np.float64]) -> Losses:
    return Losses(
        blocks.digest,
        blocks.domains,
        nll=nll,
        tokens=blocks.predicted,
        bytes=blocks.bytes,
        domain=blocks.domain,
        document=blocks.document,
    )


def summarise(losses: Losses) -> dict[str, DomainScore]:
    """Per domain: loss, standard error, perplexity, bits per byte and what they rest on."""
    summary = {}
    for name, estimate in losses.by_domain().items():
        tokens, byte_count = losses.totals(name)
        bits = bits_per_byte(estimate.mean, tokens=tokens, byte_count=byte_count)
        error = estimate.standard_error
        summary[name] = DomainScore(
            loss=estimate.mean,
            standard_error=error if math.isfinite(error) else None,
            perplexity=perplexity(estimate.mean),
            bits_per_byte=bits if math.isfinite(bits) else None,
            tokens=tokens,
            bytes=byte_count,
            documents=estimate.documents,
        )
    return summary
