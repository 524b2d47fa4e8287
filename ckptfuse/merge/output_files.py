"""What a merge's weight files hold, before a byte is computed: headers, tensors, places.

A safetensors file is a header and the tensors behind it. A distributed checkpoint's file is the
newest checkpoint's own, with the merged tensors in the place of its::

    newest's file   | archive | data | archive | archive | data | ...
    output file     | copied  |merged| copied  | copied  |merged| ...
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptfuse.checkpoints import SINGLE
from ckptfuse.formats.safetensors import encode_header
from ckptfuse.formats.tensors import Box, Tensor, tensor_bytes
from ckptfuse.merge.inputs import Inputs

#: Where a checkpoint's own sharding is none of Hugging Face's: theirs since transformers 4.
_SHARD_BYTES = 5_000_000_000
_GAP = 64 * 1024  # a smaller one is cheaper to read than to leave out


@dataclass(frozen=True, slots=True)
class Placed:
    """A box of a tensor in the output; ``tensor`` is the ancillary source's, ``start`` a byte."""

    tensor: Tensor
    dtype: str
    box: Box
    start: int
    length: int

    @property
    def width(self) -> int:
        """Bytes of an element; every dtype that is merged or copied has whole ones."""
        return tensor_bytes(self.dtype, (1,))

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of one of the newest checkpoint's files, that begin at ``start`` in the output."""

    start: int
    length: int
    file: str
    file_start: int


@dataclass(frozen=True)
class OutputFile:
    """One weight file of a merge: a header, segments, and over them the tensors, in order."""

    name: str
    header: bytes
    placed: tuple[Placed, ...]
    segments: tuple[Segment, ...] = ()

    @property
    def size(self) -> int:
        ends = [s.start + s.length for s in self.segments[-1:]] + [p.end for p in self.placed[-1:]]
        return max(ends, default=len(self.header))

    def within(self, begin: int, end: int) -> Iterator["Span"]:
        """The elements that have bytes from ``begin`` to ``end``."""
        for placed in self._overlapping(begin, end):
            first = max(begin - placed.start, 0) // placed.width
            stop = -(-(min(end - placed.start, placed.length)) // placed.width)
            yield Span(placed, first, stop - first)

    def copied_within(self, begin: int, end: int) -> Iterator[Segment]:
        """Parts of segments that hold all bytes from ``begin`` to ``end`` that no tensor does."""
        for segment in self.segments[max(bisect_right(self._segment_starts, begin) - 1, 0) :]:
            if segment.start >= end:
                return
            low, high = max(begin, segment.start), min(end, segment.start + segment.length)
            for start, stop in self._gaps(low, high):
                moved = segment.file_start + start - segment.start
                yield Segment(start, stop - start, segment.file, moved)

    def _gaps(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Ranges between tensors; those that almost touch made one."""
        gaps: list[tuple[int, int]] = []
        position = begin
        edges = [(p.start, p.end) for p in self._overlapping(begin, end)] if begin < end else []
        for start, stop in [*edges, (end, end)]:
            if start > position:
                if gaps and position - gaps[-1][1] <= _GAP:
                    gaps[-1] = (gaps[-1][0], start)
                else:
                    gaps.append((position, start))
            position = max(position, stop)
        return gaps

    def _overlapping(self, begin: int, end: int) -> Iterator[Placed]:
        index = max(bisect_right(self._starts, begin) - 1, 0)
        for placed in self.placed[index:]:
            if placed.start >= end:
                return
            if placed.length and placed.end > begin:
                yield placed

    @cached_property
    def _starts(self) -> list[int]:
        return [placed.start for placed in self.placed]

    @cached_property
    def _segment_starts(self) -> list[int]:
        return [segment.start for segment in self.segments]


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` elements of a placed box from its element ``first``, row-major."""

    placed: Placed
    first: int
    count: int

    @property
    def start(self) -> int:
        """Its first byte in the output file."""
        return self.placed.start + self.first * self.placed.width

    def cut(self, count: int) -> tuple["Span", "Span | None"]:
        """The first ``count`` of its elements, and the others if there are any."""
        if count >= self.count:
            return self, None
        rest = Span(self.placed, self.first + count, self.count - count)
        return Span(self.placed, self.first, count), rest


def output_files(inputs: Inputs) -> list[OutputFile]:
    """The merge's weight files."""
    if inputs.recipe.form == "dcp":
        return _distributed_files(inputs)
    layout = inputs.ancillary
    if layout.format == "dcp":
        groups = _shards(inputs, list(layout.tensors.values()))
    else:
        groups = {_safetensors_name(file): [] for file in layout.files}
        for tensor in layout.tensors.values():
            groups[_safetensors_name(tensor.pieces[0].file)].append(tensor)
    usual = {"format": "pt"}  # transformers refuses a file that does not say so
    return [
        _safetensors_file(name, tensors, layout.free_text.get(name, usual), inputs)
        for name, tensors in groups.items()
    ]


def weight_index(files: Sequence[OutputFile]) -> bytes | None:
    """The index of safetensors files; None where one file holds everything."""
    if [file.name for file in files] == [SINGLE]:
        return None
    weight_map = {placed.tensor.name: file.name for file in files for placed in file.placed}
    total = sum(placed.length for file in files for placed in file.placed)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _safetensors_name(file: str) -> str:
    """``pytorch_model-00001-of-00002.bin`` -> ``model-00001-of-00002.safetensors``."""
    if file.endswith(".bin"):
        return file.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"
    return file


def _shards(inputs: Inputs, tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        length = tensor_bytes(inputs.output_dtype(tensor), tensor.shape)
        if groups[-1] and size + length > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += length
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {
        f"model-{number:05}-of-{count:05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _safetensors_file(
    name: str, tensors: Sequence[Tensor], free_text: Mapping[str, str], inputs: Inputs
) -> OutputFile:
    entries = [(t.name, inputs.output_dtype(t), t.shape) for t in tensors]
    header = encode_header(entries, free_text)
    placed, position = [], len(header)
    for tensor, (_, dtype, shape) in zip(tensors, entries, strict=True):
        length = tensor_bytes(dtype, shape)
        placed.append(Placed(tensor, dtype, tensor.box, position, length))
        position += length
    return OutputFile(name, header, tuple(placed))


def _distributed_files(inputs: Inputs) -> list[OutputFile]:
    """The newest checkpoint's files, or, without its optimizer, the items that stay."""
    layout = inputs.ancillary
    items: dict[str, list[tuple[int, int]]] = {}
    for entry in layout.entries.values():
        for item in entry.items:
            items.setdefault(item.file, []).append((item.start, item.length))
    pieces: dict[str, list[Placed]] = {}
    for tensor in layout.tensors.values():
        if tensor.name not in inputs.copied:
            for piece in tensor.pieces:
                length = tensor_bytes(tensor.dtype, piece.box.shape)
                placed = Placed(tensor, tensor.dtype, piece.box, piece.start, length)
                pieces.setdefault(piece.file, []).append(placed)
    sizes = {entry.path: entry.size for entry in layout.checkpoint.files}
    files = []
    for file in sorted(items):
        kept = items[file] if inputs.recipe.optimizer == "none" else [(0, sizes[file])]
        files.append(_distributed_file(file, sorted(kept), pieces.get(file, [])))
    return files


def _distributed_file(
    file: str, kept: Iterable[tuple[int, int]], placed: Iterable[Placed]
) -> OutputFile:
    segments, position = [], 0
    for start, length in kept:
        segments.append(Segment(position, length, file, start))
        position += length
    origins = [segment.file_start for segment in segments]
    moved = []
    for one in sorted(placed, key=lambda placed: placed.start):
        segment = segments[bisect_right(origins, one.start) - 1]
        start = segment.start + one.start - segment.file_start
        moved.append(Placed(one.tensor, one.dtype, one.box, start, one.length))
    return OutputFile(file, b"", tuple(moved), tuple(segments))
