"""The merge: one streaming pass over the inputs, weighted sums of many weight vectors out.

::

    input 0 (oldest)  |--piece--|--piece--| ...  ranged reads, a few pieces ahead
    input 1           |--piece--|--piece--| ...
      ...                  |
                     to fp32, x weight, + ; oldest first, one rounding at the end
                           |
    vector 0 output   |--piece--| ...   -> a folder on disk, an S3 prefix, or memory
    vector 1 output   |--piece--| ...

Per element: input to float32 (float64 for float64 inputs), times the weight rounded to that type,
added without fused multiply-add, oldest first, zero weights skipped, one round-to-nearest-even at
the end. So the bytes do not depend on piece size, threads, source or machine. Memory is bounded by
pieces in flight x inputs, whatever the model's size. Integer and boolean tensors are copied from
the ancillary source (the newest checkpoint).
"""

import json
import math
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptfuse.checkpoints import (
    ANCILLARY_FILES,
    CONFIG,
    INDEX,
    VOLATILE_CONFIG,
    Checkpoint,
    Contents,
    Layout,
    config_identity,
    read_layout,
)
from ckptfuse.digests import TreeHasher, content_digest
from ckptfuse.errors import ConfigurationError, MismatchedCheckpoints, NonFiniteValues
from ckptfuse.formats.safetensors import Tensor, encode_header, tensor_bytes
from ckptfuse.fusion import FusionSpec
from ckptfuse.reading import DTYPES, check_finite, check_unchanged, torch_dtype
from ckptfuse.store import FolderStore, Store, remove_folder

PIECE_ELEMENTS = 2 * 1024 * 1024
PIECES_AHEAD = 4
READ_THREADS = 8

_MERGED = {"F16", "BF16", "F32", "F64"}
_COPIED = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
_OUTPUT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Piece:
    """``count`` elements of one tensor from element ``first``; ``last`` ends its tensor."""

    tensor: Tensor
    first: int
    count: int


@dataclass(frozen=True)
class Inputs:
    """Checkpoints that were checked to fit each other, oldest first.

    ``ancillary`` gives configuration, tokenizer, sharding and the tensors that are copied; it may
    or may not be one of the layouts.
    """

    layouts: tuple[Layout, ...]
    ancillary: Layout
    dtype: str | None = None

    def output_dtype(self, tensor: Tensor) -> str:
        if tensor.dtype in _MERGED and self.dtype is not None:
            return _OUTPUT[self.dtype]
        return tensor.dtype


def open_inputs(
    checkpoints: Sequence[Checkpoint], ancillary: Checkpoint, dtype: str | None = None
) -> Inputs:
    """Read and compare every header before a byte of data.

    Raises MismatchedCheckpoints naming the tensor or configuration key that differs.
    """
    if not checkpoints:
        raise ConfigurationError("nothing to merge: no checkpoint was given")
    reference = read_layout(ancillary)
    layouts = tuple(read_layout(checkpoint) for checkpoint in checkpoints)
    for layout in layouts:
        _check_same(layout, reference)
    for tensor in reference.tensors.values():
        if tensor.dtype not in _MERGED | _COPIED:
            raise MismatchedCheckpoints(
                f"{ancillary.uri}: tensor {tensor.name!r} is {tensor.dtype}, whose scales this "
                "merge does not know; convert the checkpoints to bfloat16 first"
            )
    return Inputs(layouts, reference, dtype)


def _check_same(layout: Layout, reference: Layout) -> None:
    here, there = layout.checkpoint.uri, reference.checkpoint.uri
    if layout.tensors.keys() != reference.tensors.keys():
        only_here = sorted(layout.tensors.keys() - reference.tensors.keys())
        only_there = sorted(reference.tensors.keys() - layout.tensors.keys())
        raise MismatchedCheckpoints(
            f"{here} and {there} hold different tensors: only the first has {only_here[:3]}, only "
            f"the second {only_there[:3]}; checkpoints of one trajectory are needed"
        )
    for name, tensor in layout.tensors.items():
        other = reference.tensors[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            raise MismatchedCheckpoints(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)} in {here} and "
                f"{other.dtype} {list(other.shape)} in {there}; leave one of them out"
            )
    if config_identity(layout.config) != config_identity(reference.config):
        keys = layout.config.keys() | reference.config.keys()
        differing = sorted(
            key
            for key in keys - VOLATILE_CONFIG
            if layout.config.get(key) != reference.config.get(key)
        )
        raise MismatchedCheckpoints(
            f"config.json of {here} and {there} differ in {', '.join(differing)}; a merge across a "
            "change of the architecture or of the training setup is not a model"
        )


def merged_pieces(
    inputs: Inputs, vectors: Sequence[Sequence[float]], *, piece_elements: int = PIECE_ELEMENTS
) -> Iterator[tuple[Piece, list[torch.Tensor]]]:
    """One pass: for each piece of each tensor, in file order, one flat tensor per weight vector.

    Each input with a weight in any vector is read once. Raises NonFiniteValues naming checkpoint
    and tensor, ChangedCheckpoint if an input was written again during the pass.
    """
    for vector in vectors:
        if len(vector) != len(inputs.layouts):
            raise ConfigurationError(f"{len(vector)} weights for {len(inputs.layouts)} inputs")
    read = [any(vector[i] for vector in vectors) for i in range(len(inputs.layouts))]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        pending: deque[tuple[Piece, dict[int, Future[torch.Tensor]]]] = deque()
        for piece in _pieces(inputs.ancillary, piece_elements):
            pending.append((piece, _submit(pool, piece, inputs, read)))
            if len(pending) > PIECES_AHEAD:
                yield _combine(*pending.popleft(), inputs, vectors)
        while pending:
            yield _combine(*pending.popleft(), inputs, vectors)
    for layout, was_read in zip(inputs.layouts, read, strict=True):
        if was_read:
            check_unchanged(layout.checkpoint)


def _pieces(layout: Layout, piece_elements: int) -> Iterator[Piece]:
    for tensor in layout.tensors.values():
        total = _elements(tensor)
        for first in range(0, total, piece_elements):
            yield Piece(tensor, first, min(piece_elements, total - first))


_COPY = -1  # stands for the ancillary source among the indices of a piece's reads


def _submit(
    pool: ThreadPoolExecutor, piece: Piece, inputs: Inputs, read: Sequence[bool]
) -> dict[int, Future[torch.Tensor]]:
    if piece.tensor.dtype in _COPIED:
        return {_COPY: pool.submit(_read_piece, inputs.ancillary, piece)}
    chosen = [i for i, wanted in enumerate(read) if wanted]
    return {i: pool.submit(_read_piece, inputs.layouts[i], piece) for i in chosen}


def _read_piece(layout: Layout, piece: Piece) -> torch.Tensor:
    tensor = layout.tensors[piece.tensor.name]
    width = tensor.length // max(1, _elements(tensor))
    store = layout.checkpoint.store()
    data = store.read_range(tensor.file, tensor.start + piece.first * width, piece.count * width)
    if tensor.dtype not in DTYPES:  # U16, U32, U64: copied as bytes
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch_dtype(tensor, layout.checkpoint))


def _elements(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _combine(
    piece: Piece,
    reads: Mapping[int, Future[torch.Tensor]],
    inputs: Inputs,
    vectors: Sequence[Sequence[float]],
) -> tuple[Piece, list[torch.Tensor]]:
    if _COPY in reads:
        copied = reads[_COPY].result()
        return piece, [copied] * len(vectors)
    wide = torch.float64 if piece.tensor.dtype == "F64" else torch.float32
    values = {i: read.result().to(wide) for i, read in reads.items()}
    output = DTYPES[inputs.output_dtype(piece.tensor)]
    results = []
    for vector in vectors:
        total = weighted_sum([(values[i], vector[i]) for i in values if vector[i]])
        result = total.to(output)
        if not bool(torch.isfinite(result).all()):
            _blame(piece, values, inputs, result.dtype)
        results.append(result)
    return piece, results


def weighted_sum(terms: Iterable[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Sum of values x weight, in the values' dtype, in order; product and sum round separately."""
    total: torch.Tensor | None = None
    for values, weight in terms:
        product = values * weight  # a Python scalar is rounded to the values' dtype
        total = product if total is None else total.add_(product)
    assert total is not None, "a weight vector with no weight"
    return total


def _blame(
    piece: Piece, values: Mapping[int, torch.Tensor], inputs: Inputs, output: torch.dtype
) -> None:
    for i, part in values.items():
        check_finite(part, name=piece.tensor.name, checkpoint=inputs.layouts[i].checkpoint)
    raise NonFiniteValues(
        f"tensor {piece.tensor.name!r}: the merge overflows {output} although every input is "
        "finite; ask for a wider output dtype (fuse.dtype)",
        checkpoint="",
    )


def merge_to_memory(inputs: Inputs, weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The merge as a state dict, without touching disk; equal to what a folder would hold."""
    state_dict: dict[str, torch.Tensor] = {}
    for name, tensor in inputs.ancillary.tensors.items():
        dtype = torch_dtype(tensor, inputs.ancillary.checkpoint)
        output = DTYPES[inputs.output_dtype(tensor)] if tensor.dtype in _MERGED else dtype
        state_dict[name] = torch.empty(_elements(tensor), dtype=output)
    for piece, (merged,) in merged_pieces(inputs, [weights]):
        state_dict[piece.tensor.name][piece.first : piece.first + piece.count] = merged
    return {
        name: flat.reshape(inputs.ancillary.tensors[name].shape)
        for name, flat in state_dict.items()
    }


def merge_to_stores(
    inputs: Inputs, vectors: Sequence[Sequence[float]], stores: Sequence[Store]
) -> list[Contents]:
    """Write the weight files of one merge per vector into its store, all in one pass.

    Returns each output's files: path -> (size, content hash).
    """
    contents: list[Contents] = [{} for _ in vectors]
    pieces = merged_pieces(inputs, vectors)
    for file, header in inputs.ancillary.headers.items():
        entries = [(t.name, inputs.output_dtype(t), t.shape) for t in header.tensors]
        start = encode_header(entries, header.metadata)
        count = sum(-(-_elements(tensor) // PIECE_ELEMENTS) for tensor in header.tensors)
        with ExitStack() as stack:
            outputs = [stack.enter_context(_hashed(store, file)) for store in stores]
            for output in outputs:
                output.write(start)
            for _ in range(count):
                _, merged = next(pieces)
                for output, values in zip(outputs, merged, strict=True):
                    output.write(values.view(torch.uint8).numpy().data)
        for output, files in zip(outputs, contents, strict=True):
            files[file] = (output.size, output.hasher.hexdigest())
    for _ in pieces:  # ends the pass: its last checks run
        raise AssertionError("pieces are left after the last file")
    return contents


class _HashedWriter:
    def __init__(self, out: object) -> None:
        self._write = out.write  # type: ignore[attr-defined]
        self.hasher = TreeHasher()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._write(data)
        self.hasher.update(data)
        self.size += len(data)


@contextmanager
def _hashed(store: Store, file: str) -> Iterator[_HashedWriter]:
    with store.writer(file) as out:
        yield _HashedWriter(out)


def write_fusion(inputs: Inputs, spec: FusionSpec, target: Store) -> Contents:
    """Write a whole model folder: shards, index, ancillary files, fusion.json and model card.

    In a folder store it appears by one rename; on S3 config.json comes last, without which no
    reader takes the prefix for a model. Returns path -> (size, content hash).
    """
    if isinstance(target, FolderStore):
        temporary = target.root.with_name(f".{target.root.name}-{uuid.uuid4().hex}")
        try:
            contents = _write_files(inputs, spec, FolderStore(temporary))
            _rename(temporary, target.root)
        finally:
            remove_folder(temporary)
        return contents
    return _write_files(inputs, spec, target)


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError as error:
        raise ConfigurationError(f"{target} is there already; choose another place") from error


def _write_files(inputs: Inputs, spec: FusionSpec, target: Store) -> Contents:
    (contents,) = merge_to_stores(inputs, [spec.weights], [target])
    small = {"fusion.json": spec.provenance(), "README.md": spec.model_card()}
    source = inputs.ancillary.checkpoint.store()
    for entry in inputs.ancillary.checkpoint.files:
        if entry.path in ANCILLARY_FILES | {INDEX}:
            small[entry.path] = source.read(entry.path)
    if inputs.dtype is not None:
        small[CONFIG] = _with_dtype(small[CONFIG], inputs.dtype)
        if INDEX in small:
            small[INDEX] = _with_total_size(small[INDEX], inputs)
    for path in sorted(small, key=lambda path: (path == CONFIG, path)):
        target.write(path, small[path])
        contents[path] = (len(small[path]), content_digest(small[path]))
    return contents


def _with_dtype(config: bytes, dtype: str) -> bytes:
    values = json.loads(config)
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    return (json.dumps({**values, key: dtype}, indent=2, sort_keys=True) + "\n").encode()


def _with_total_size(index: bytes, inputs: Inputs) -> bytes:
    values = json.loads(index)
    tensors = inputs.ancillary.tensors.values()
    total = sum(tensor_bytes(inputs.output_dtype(t), t.shape) for t in tensors)
    values["metadata"] = {**values.get("metadata", {}), "total_size": total}
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
