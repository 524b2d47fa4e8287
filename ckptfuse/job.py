"""The score job: ``python -m ckptfuse.job REQUEST.json``, one process per GPU job.

Reads each model of the request into memory (a checkpoint, or a merge that it makes itself),
scores it on each set of blocks, writes the score records and prints JSON lines (protocol.py).
Records that are there already are not computed again. One model's failure does not stop the next.
"""

import gc
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch

from ckptfuse.blocks import Blocks
from ckptfuse.checkpoints import Checkpoint, open_checkpoint
from ckptfuse.compiled import keep_in
from ckptfuse.conversion import check_converter, convert, model_config
from ckptfuse.engines import by_command, by_model, check_blocks
from ckptfuse.errors import ChangedCheckpoint, CkptfuseError, DamagedCheckpoint, NonFiniteValues
from ckptfuse.fusion import Recipe
from ckptfuse.heap import keep_freed_memory
from ckptfuse.layouts import read_config, read_layout
from ckptfuse.merge.folder import write_and_identify
from ckptfuse.merge.inputs import Inputs, open_inputs
from ckptfuse.merge.memory import merge_to_memory
from ckptfuse.modeling import build_model, outline_of
from ckptfuse.own_code import read_code
from ckptfuse.perplexity import BlockLosses
from ckptfuse.protocol import (
    BlockSet,
    CheckpointModel,
    EngineRequest,
    Failed,
    Input,
    MergeModel,
    Message,
    Model,
    Notice,
    Progress,
    Read,
    Reading,
    Request,
    Scored,
)
from ckptfuse.reading import Loaded, load
from ckptfuse.record_files import Records
from ckptfuse.score_records import is_recorded, losses_from, write_score
from ckptfuse.store import open_store, throttle

_events: IO[str] | None = None  # None: standard output, as long as it is used for nothing else
_Weights = tuple[Mapping[str, object], Mapping[str, torch.Tensor]]  # configuration, state dict


def run(request: Request) -> None:
    """Score every model of the request, in order."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    records = Records(open_store(request.records))
    # On a CPU the reading would take from the scoring, and the memory is the same. A command wants
    # that memory for itself.
    ahead = request.numerics.device_class != "cpu" and not request.command
    checkpoints = _Checkpoints(request, ahead=ahead)
    for index, model in enumerate(request.models):
        try:
            _score_model(index, model, request, records, checkpoints)
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
        except Exception as error:  # a model's own code may do anything
            traceback.print_exc()
            where = model.input.uri if isinstance(model, CheckpointModel) else model.fusion[:16]
            _emit(Failed(model=index, error="other", reason=f"{where}: {error!r}"))
        if request.split:
            gc.collect()  # accelerate's hooks and the layers that they are on refer to each other


class _Checkpoints:
    """The request's checkpoints, in order; with ``ahead``, one is read while another is scored."""

    def __init__(self, request: Request, *, ahead: bool) -> None:
        self._request = request
        self._ahead = ahead
        self._reader = ThreadPoolExecutor(1)
        self._reading: dict[int, Future[Loaded]] = {}

    def take(self, index: int) -> Loaded:
        """The checkpoint at this index of the request; it is the caller's alone from here on."""
        self._read(index)
        loaded = self._reading.pop(index).result()
        if self._ahead:
            self._read(index + 1)
        return loaded

    def _read(self, index: int) -> None:
        models = self._request.models
        model = models[index] if index < len(models) else None
        if not isinstance(model, CheckpointModel) or index in self._reading:
            return
        try:
            # In this thread: building a model's outline changes torch's defaults for all of them.
            checkpoint = _open(model.input, self._request)
        except Exception as error:  # of this model, when it is taken
            self._reading[index] = Future()
            self._reading[index].set_exception(error)
        else:
            self._reading[index] = self._reader.submit(_load, checkpoint, model.input.fingerprint)


def _score_model(
    index: int, model: Model, request: Request, records: Records, checkpoints: _Checkpoints
) -> None:
    started = time.perf_counter()
    if isinstance(model, CheckpointModel):
        loaded = checkpoints.take(index)
        if request.command:
            loaded.state_dict.clear()  # they were read to be checked: the command loads its own
        model_id, where = loaded.fingerprint, model.input.uri
        place = where
        read = partial(_read, loaded)
        _emit(Read(model=index, fingerprint=model_id, architecture=loaded.layout.architecture))
    else:
        model_id, where = model.fusion, f"fusion {model.fusion[:16]}"
        read = partial(_merge, model)
        place = model.ancillary.uri
    converted = isinstance(model, MergeModel) and model.converted
    todo = [
        item
        for item in request.blocks
        if not is_recorded(
            records, model_id=model_id, blocks=item.digest, numerics=request.numerics
        )
    ]
    predicted = 0
    if todo:
        engine = (
            _command_engine(model, request, todo)
            if request.command
            else _own_engine(index, read, request, todo, where, place, converted=converted)
        )
        for item, blocks, found in engine:
            losses = losses_from(blocks, found.nll)
            if not math.isfinite(float(found.nll.sum())):
                raise NonFiniteValues(
                    f"{where}: the loss is NaN or Inf on {item.split} text although every weight "
                    "is finite",
                    checkpoint=where,
                )
            write_score(
                records,
                losses,
                model_id=model_id,
                split=item.split,
                numerics=request.numerics,
                batch_tokens=found.batch_tokens,
                compiled=found.compiled,
            )
            predicted += int(losses.tokens.sum())
    seconds = time.perf_counter() - started
    _emit(Scored(model=index, model_id=model_id, seconds=round(seconds, 3), tokens=predicted))


def _own_engine(
    index: int,
    read: Callable[[], _Weights],
    request: Request,
    todo: Sequence[BlockSet],
    where: str,
    place: str,
    *,
    converted: bool,
) -> Iterator[tuple[BlockSet, Blocks, BlockLosses]]:
    """``place``: the folder that the model's configuration is from, unless it is converted."""
    config, state_dict = read()
    if request.model is not None and not converted:
        config, state_dict = convert(request.converter, request.model, state_dict, where)
        place = request.model
    network = build_model(
        config,
        state_dict,
        numerics=request.numerics,
        where=where,
        split=request.split,
        code=_code(request, place),
    )
    del state_dict
    yield from by_model(
        network,
        todo,
        batch_tokens=request.batch_tokens,
        where=where,
        progress=lambda total, done: _emit(Progress(model=index, done=done, total=total)),
        notice=lambda text: _emit(Notice(model=index, text=text)),
    )


def _command_engine(
    model: Model, request: Request, todo: Sequence[BlockSet]
) -> Iterator[tuple[BlockSet, Blocks, BlockLosses]]:
    """A merge is written to a folder for the command, unless it is one that lies there already."""
    with tempfile.TemporaryDirectory(prefix="merge-", dir=request.scratch) as folder:
        if isinstance(model, CheckpointModel):
            uri = model.input.uri
        elif model.weights == (1.0,):
            uri = model.inputs[0].uri
        else:
            uri = f"{folder}/model"
            inputs, weights = _inputs(model)
            write_and_identify(inputs, weights, model.fusion, open_store(uri))
        asked = EngineRequest(
            model=uri,
            blocks=tuple(todo),
            numerics=request.numerics,
            batch_tokens=request.batch_tokens,
            threads=request.threads,
        )
        yield from by_command(request.command, asked)


def _code(request: Request, place: str) -> Mapping[str, bytes] | None:
    return read_code(open_store(place)) if request.trust_remote_code else None


def _open(source: Input, request: Request) -> Checkpoint:
    """Its listing and headers; no weights are read. Raises what these settings cannot score."""
    checkpoint = open_checkpoint(source.uri, source.signature)
    if not request.command:
        _check_settings(checkpoint, request)
    return checkpoint


def _load(checkpoint: Checkpoint, fingerprint: str | None) -> Loaded:
    loaded = load(checkpoint)
    if fingerprint is not None and loaded.fingerprint != fingerprint:
        raise ChangedCheckpoint(
            f"{checkpoint.uri}: its bytes have fingerprint {loaded.fingerprint[:16]}, where "
            f"{fingerprint[:16]} was pinned; it was written again since"
        )
    return loaded


def _check_settings(checkpoint: Checkpoint, request: Request) -> None:
    """Refuse what these settings can never score by its configuration and headers, a few kB.

    The service tries such a checkpoint again with each look, and its weights may be a terabyte.
    """
    where, place = checkpoint.uri, request.model or checkpoint.uri
    config = model_config(place) if request.model else read_config(open_store(place))
    code = _code(request, place)
    outline = outline_of(config, numerics=request.numerics, where=where, code=code)
    check_blocks(outline.model, request.blocks, where)
    if request.model is not None and request.converter is not None:
        check_converter(request.converter, request.model, read_layout(checkpoint))


def _read(loaded: Loaded) -> _Weights:
    """The tensors change hands: held here too they would stay in memory beside the model's."""
    tensors = dict(loaded.state_dict)
    loaded.state_dict.clear()
    return loaded.layout.config, tensors


def _merge(model: MergeModel) -> _Weights:
    inputs, weights = _inputs(model)
    return inputs.ancillary.config, merge_to_memory(inputs, weights)


def _inputs(model: MergeModel) -> tuple[Inputs, list[float]]:
    used = [(i, w) for i, w in zip(model.inputs, model.weights, strict=True) if w]
    checkpoints = [open_checkpoint(item.uri, item.signature) for item, _ in used]
    ancillary = open_checkpoint(model.ancillary.uri, model.ancillary.signature)
    recipe = Recipe(dtype=model.dtype, copied=model.copied)
    return open_inputs(checkpoints, ancillary, recipe), [weight for _, weight in used]


def _culprit(model: Model, error: NonFiniteValues) -> str | None:
    if isinstance(model, CheckpointModel):
        return model.input.uri
    names = {item.uri.rstrip("/").rpartition("/")[2]: item.uri for item in model.inputs}
    return names.get(error.checkpoint)


def _emit(message: Message) -> None:
    print(message.model_dump_json(), file=_events, flush=True)


def _keep_events_apart() -> None:
    """Leave standard output to events: what else this process prints goes to standard error.

    A model's own code may print what is no whole line, in which the next event would be lost.
    """
    global _events
    _events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def main(path: str) -> None:
    _keep_events_apart()
    request = Request.model_validate_json(Path(path).read_bytes())
    _keep_to(request.reading)
    if request.numerics.device_class == "cpu" and not request.command:
        keep_freed_memory()
    elif request.scratch is not None:
        keep_in(Path(request.scratch, "compiled"))
    run(request)


def _keep_to(reading: Reading) -> None:
    limits = throttle.Limits(reading.megabytes_per_second, reading.requests_per_second)
    throttle.configure(limits, own=map(Path, reading.own))


if __name__ == "__main__":
    main(sys.argv[1])
