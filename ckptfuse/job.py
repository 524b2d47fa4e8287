"""The score job: ``python -m ckptfuse.job REQUEST.json``, one process per GPU job.

Reads each model of the request into memory (a checkpoint, or a merge that it makes itself),
scores it on each set of blocks, writes the score records and prints JSON lines (protocol.py).
Records that are there already are not computed again. One model's failure does not stop the next.
"""

import math
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch
from numpy.typing import NDArray

from ckptfuse import blocks as blocks_module
from ckptfuse.blocks import Blocks
from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.conversion import convert
from ckptfuse.errors import ChangedCheckpoint, CkptfuseError, DamagedCheckpoint, NonFiniteValues
from ckptfuse.fusion import Recipe
from ckptfuse.losses import Losses, bits_per_byte
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.merge.memory import merge_to_memory
from ckptfuse.modeling import build_model, vocabulary_size
from ckptfuse.perplexity import score_blocks
from ckptfuse.protocol import (
    BlockSet,
    CheckpointModel,
    Failed,
    Input,
    MergeModel,
    Message,
    Model,
    Progress,
    Read,
    Reading,
    Request,
    Scored,
    score_key,
)
from ckptfuse.reading import Loaded, load
from ckptfuse.records import Arrays, DomainScore, Records, ScoreRecord
from ckptfuse.store import open_store, throttle

_Weights = tuple[Mapping[str, object], Mapping[str, torch.Tensor]]  # configuration, state dict


def run(request: Request) -> None:
    """Score every model of the request, in order."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    records = Records(open_store(request.records))
    for index, model in enumerate(request.models):
        try:
            _score_model(index, model, request, records)
        except NonFiniteValues as error:
            _emit(
                Failed(
                    model=index,
                    error="non-finite",
                    reason=str(error),
                    checkpoint=_culprit(model, error),
                )
            )
        except ChangedCheckpoint as error:
            _emit(Failed(model=index, error="changed", reason=str(error)))
        except DamagedCheckpoint as error:
            _emit(Failed(model=index, error="damaged", reason=str(error)))
        except CkptfuseError as error:
            _emit(Failed(model=index, error="other", reason=str(error)))


def _score_model(index: int, model: Model, request: Request, records: Records) -> None:
    started = time.perf_counter()
    if isinstance(model, CheckpointModel):
        loaded = _load(model.input)
        model_id, where = loaded.fingerprint, model.input.uri
        read = partial(_read, loaded)
        _emit(Read(model=index, fingerprint=model_id, architecture=loaded.layout.architecture))
    else:
        model_id, where = model.fusion, f"fusion {model.fusion[:16]}"
        read = partial(_merge, model)
    todo = [
        item
        for item in request.blocks
        if not records.has(ScoreRecord, _key(model_id, item, request))
    ]
    predicted = 0
    if todo:
        config, state_dict = read()
        if request.model is not None:
            config, state_dict = convert(request.converter, request.model, state_dict, where)
        network = build_model(
            config,
            state_dict,
            numerics=request.numerics,
            where=where,
            trust_remote_code=request.trust_remote_code,
        )
        del state_dict
        for item in todo:
            predicted += _score_blocks(index, network, model_id, item, request, records, where)
    seconds = time.perf_counter() - started
    _emit(Scored(model=index, model_id=model_id, seconds=round(seconds, 3), tokens=predicted))


def _load(source: Input) -> Loaded:
    loaded = load(open_checkpoint(source.uri, source.signature))
    if source.fingerprint is not None and loaded.fingerprint != source.fingerprint:
        raise ChangedCheckpoint(
            f"{source.uri}: its bytes have fingerprint {loaded.fingerprint[:16]}, where "
            f"{source.fingerprint[:16]} was pinned; it was written again since"
        )
    return loaded


def _read(loaded: Loaded) -> _Weights:
    return loaded.layout.config, loaded.state_dict


def _merge(model: MergeModel) -> _Weights:
    used = [(i, w) for i, w in zip(model.inputs, model.weights, strict=True) if w]
    checkpoints = [open_checkpoint(item.uri, item.signature) for item, _ in used]
    ancillary = open_checkpoint(model.ancillary.uri, model.ancillary.signature)
    recipe = Recipe(dtype=model.dtype, copied=model.copied)
    inputs = open_inputs(checkpoints, ancillary, recipe)
    return inputs.ancillary.config, merge_to_memory(inputs, [weight for _, weight in used])


def _score_blocks(
    index: int,
    network: torch.nn.Module,
    model_id: str,
    item: BlockSet,
    request: Request,
    records: Records,
    where: str,
) -> int:
    blocks = blocks_module.load(item.folder)
    _check_length(network, blocks, where)
    nll = score_blocks(
        network,
        blocks,
        vocabulary=vocabulary_size(network),
        batch_tokens=request.batch_tokens,
        progress=lambda done: _emit(Progress(model=index, done=done, total=len(blocks))),
    )
    if not math.isfinite(float(nll.sum())):
        raise NonFiniteValues(
            f"{where}: the loss is NaN or Inf on {item.split} text although every weight is finite",
            checkpoint=where,
        )
    losses = losses_of(blocks, nll)
    record = ScoreRecord(
        model=model_id,
        blocks=item.digest,
        split=item.split,
        numerics=request.numerics.key,
        batch_tokens=request.batch_tokens,
        domains=summarise(losses),
    )
    arrays: Arrays = {
        "nll": losses.nll,
        "tokens": losses.tokens,
        "bytes": losses.bytes,
        "domain": losses.domain,
        "document": losses.document,
    }
    records.put(_key(model_id, item, request), record, arrays)
    return int(losses.tokens.sum())


def _check_length(network: torch.nn.Module, blocks: Blocks, where: str) -> None:
    longest = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    block = int(blocks.lengths.max())
    if isinstance(longest, int) and block > longest:
        raise CkptfuseError(
            f"{where}: blocks of {block} tokens exceed the model's {longest} positions; set "
            f"scoring.block_length to {longest} or less"
        )


def losses_of(blocks: Blocks, nll: NDArray) -> Losses:  # type: ignore[type-arg]
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
            perplexity=math.exp(estimate.mean) if estimate.mean < 700 else None,
            bits_per_byte=bits if math.isfinite(bits) else None,
            tokens=tokens,
            bytes=byte_count,
            documents=estimate.documents,
        )
    return summary


def _key(model_id: str, item: BlockSet, request: Request) -> str:
    return score_key(model_id=model_id, blocks=item.digest, numerics=request.numerics)


def _culprit(model: Model, error: NonFiniteValues) -> str | None:
    if isinstance(model, CheckpointModel):
        return model.input.uri
    names = {item.uri.rstrip("/").rpartition("/")[2]: item.uri for item in model.inputs}
    return names.get(error.checkpoint)


def _emit(message: Message) -> None:
    print(message.model_dump_json(), flush=True)


def main(path: str) -> None:
    request = Request.model_validate_json(Path(path).read_bytes())
    _keep_to(request.reading)
    run(request)


def _keep_to(reading: Reading) -> None:
    limits = throttle.Limits(reading.megabytes_per_second, reading.requests_per_second)
    throttle.configure(limits, own=map(Path, reading.own))


if __name__ == "__main__":
    main(sys.argv[1])
