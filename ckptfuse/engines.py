"""What computes the losses of a job's models: our own scorer, or a command of the team's.

The command gets the path of a JSON document (protocol.EngineRequest) as its last argument: a model
folder and fixed token blocks. It answers on standard output with JSON lines: ``losses`` with the
summed negative log-likelihood of each block, one line for each set of blocks, or ``failed``.
Everything else stays ours: what the model's bytes are, its merge, and the records.
``examples/own_engine.py`` is one.
"""

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError

from ckptfuse import blocks as blocks_module
from ckptfuse.blocks import Blocks
from ckptfuse.checkpoints import longest_context
from ckptfuse.errors import CkptfuseError, JobError
from ckptfuse.modeling import vocabulary_size
from ckptfuse.perplexity import BlockLosses, check_vocabulary, score_blocks
from ckptfuse.processes import end_with_parent, last_words
from ckptfuse.protocol import BlockSet, EngineFailed, EngineLosses, EngineRequest

#: Told of blocks in all and done.
Progress = Callable[[int, int], None]
_ANSWER: TypeAdapter[EngineLosses | EngineFailed] = TypeAdapter(
    Annotated[EngineLosses | EngineFailed, Field(discriminator="event")]
)


def by_model(
    network: torch.nn.Module,
    items: Sequence[BlockSet],
    *,
    batch_tokens: int | None,
    where: str,
    progress: Progress,
    notice: Callable[[str], None],
) -> Iterator[tuple[BlockSet, Blocks, BlockLosses]]:
    """Score a model in memory on one set of blocks after another."""
    check_blocks(network, items, where)
    notice = cache(notice)  # what is true of the model would be said for each set of blocks
    for item in items:
        blocks = blocks_module.load(item.folder)
        found = score_blocks(
            network,
            blocks,
            vocabulary=vocabulary_size(network),
            batch_tokens=batch_tokens,
            progress=partial(progress, len(blocks)),
            notice=notice,
        )
        batch_tokens = found.batch_tokens
        yield item, blocks, found


def check_blocks(network: torch.nn.Module, items: Sequence[BlockSet], where: str) -> None:
    """Raise CkptfuseError for text that a model cannot read; its weights need not be there."""
    for item in items:
        blocks = blocks_module.load(item.folder)
        _check_length(network, blocks, where)
        check_vocabulary(blocks, vocabulary_size(network))


def _check_length(network: torch.nn.Module, blocks: Blocks, where: str) -> None:
    config = getattr(network, "config", None)
    longest = longest_context(config.to_dict()) if config is not None else None
    read = int(blocks.lengths.max()) - 1  # of the last token no successor is asked
    if longest is not None and read > longest:
        raise CkptfuseError(
            f"{where}: to read {read} tokens of a block exceeds the model's {longest} positions; "
            f"set scoring.block_length (--block-length) to {longest} or less"
        )


def by_command(
    command: Sequence[str], request: EngineRequest
) -> Iterator[tuple[BlockSet, Blocks, BlockLosses]]:
    """Let a command score the model of the request.

    Raises CkptfuseError with the reason that the command gives, JobError when it dies, leaves out
    blocks or answers with what cannot be losses.
    """
    answers = _run(command, request)
    for item in request.blocks:
        blocks = blocks_module.load(item.folder)
        nll = answers.get(item.digest, np.empty(0))
        if wrong := _wrong_with(nll, len(blocks)):
            raise JobError(f"{_named(command)} answered {wrong} of the {item.split} split")
        yield item, blocks, BlockLosses(nll, request.batch_tokens or 0)


def _wrong_with(nll: np.ndarray, blocks: int) -> str | None:
    """Why an answer cannot be the losses of so many blocks."""
    if len(nll) != blocks:
        return f"with {len(nll)} losses, where one is expected for each of the {blocks} blocks"
    # Of weights that are known to be finite: the engine is to blame, and may do better next time.
    impossible = ~np.isfinite(nll) | (nll < 0)
    if impossible.any():
        block = int(np.argmax(impossible))
        return f"with {nll[block]} nats, which is no negative log-likelihood, for block {block}"
    return None


def _named(command: Sequence[str]) -> str:
    return f"scoring.command ({shlex.join(command)})"


def _run(command: Sequence[str], request: EngineRequest) -> Mapping[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        path, errors = Path(folder, "request.json"), Path(folder, "stderr")
        path.write_text(request.model_dump_json())
        try:
            with errors.open("wb") as stderr:
                done = subprocess.run(
                    [*command, str(path)],
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    check=False,
                    preexec_fn=end_with_parent,
                )
        except OSError as error:
            raise JobError(f"{_named(command)} cannot be run: {error}") from error
        told = last_words(errors)
    losses = {}
    for line in done.stdout.splitlines():
        answer = _answer(line, command)
        if isinstance(answer, EngineFailed):
            raise CkptfuseError(f"{request.model}: {answer.reason}")
        if answer is not None:
            losses[answer.blocks] = np.asarray(answer.nll, dtype=np.float64)
    if done.returncode != 0:
        status = f"{_named(command)} ended with status {done.returncode}: {told}"
        raise JobError(status.removesuffix(": "))
    return losses


def _answer(line: bytes, command: Sequence[str]) -> EngineLosses | EngineFailed | None:
    """The answer in a line of standard output; None for whatever else is printed there."""
    try:
        return _ANSWER.validate_json(line)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if not fault["loc"]:  # no JSON, or none with an event of ours
            return None
        event, *place = map(str, fault["loc"])
        raise JobError(
            f"{_named(command)} printed an answer {event!r} that is none, at "
            f"{'.'.join(place)}: {fault['msg']}"
        ) from error
