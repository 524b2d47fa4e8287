"""Content hashes of the inputs, from the bytes that a merge reads anyway.

Where an input's file is laid out as the output's is, which is the rule within a trajectory, the
leaves of both are the same ranges: as a stretch of them is merged, what is read of each input goes
through a hash in order, and what no tensor covers (headers, other archives) is read for the hash
alone. So a merge by hand, which knows no fingerprints, reads every byte once.
"""

from collections.abc import Mapping

from ckptfuse import digests
from ckptfuse.checkpoints import Contents
from ckptfuse.formats.tensors import Piece
from ckptfuse.layouts import Layout
from ckptfuse.merge.output_files import OutputFile
from ckptfuse.store import Reader


class StretchHash:
    """Leaf digests of one file's bytes from ``begin`` to ``end``, which come in rising order."""

    def __init__(self, file: str, reader: Reader, begin: int, end: int, buffer: memoryview) -> None:
        self.file = file
        self._reader = reader
        self._position = begin
        self._end = end
        self._buffer = buffer
        self._hasher = digests.TreeHasher()

    def take(self, file: str, start: int, data: memoryview) -> None:
        """Bytes that were read from ``start`` of ``file``; of another file they do not count."""
        if file != self.file:
            return
        self._fill(min(start, self._end))
        skip = self._position - start  # an element on a border is read for both of its sides
        self._update(data[skip : self._end - start])

    def leaves(self) -> list[bytes]:
        self._fill(self._end)
        return self._hasher.leaves()

    def _fill(self, to: int) -> None:
        while self._position < to:
            part = self._buffer[: to - self._position]
            self._reader.read_into(self._position, part)
            self._update(part)

    def _update(self, part: memoryview) -> None:
        self._hasher.update(part)
        self._position += len(part)


class InputHashes:
    """What a pass has hashed of each input: file -> (size, content hash), by the layout's index."""

    def __init__(self, layouts: tuple[Layout, ...]) -> None:
        self.layouts = layouts
        self.contents: list[Contents] = [{} for _ in layouts]

    def aligned(self, file: OutputFile) -> list[int]:
        """The inputs that have this file, laid out in the same way."""
        return [i for i, layout in enumerate(self.layouts) if _is_aligned(layout, file)]

    def add(self, file: OutputFile, leaves: Mapping[int, list[bytes]]) -> None:
        for i, found in leaves.items():
            self.contents[i][file.name] = (file.size, digests.tree_digest(found))


def _is_aligned(layout: Layout, file: OutputFile) -> bool:
    sizes = {entry.path: entry.size for entry in layout.checkpoint.files}
    return sizes.get(file.name) == file.size and all(
        placed.dtype == placed.tensor.dtype
        and Piece(file.name, placed.start, placed.box) in layout.tensors[placed.tensor.name].pieces
        for placed in file.placed
    )
