"""PyTorch distributed checkpoints (DCP): ``.metadata`` and what every rank wrote beside it.

    .metadata        a pickle: for each name its dtype, shape and chunks, and where each chunk lies
    __0_0.distcp     rank 0's items, back to back; each is an archive of torch.save (torch_zip.py)
    __1_0.distcp     ...

torchtitan, FSDP, OLMo-core and Megatron's torch_dist write them. ``.metadata`` comes last, so a
checkpoint that has one is whole. Format: torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ckptfuse.errors import DamagedCheckpoint, IncompleteCheckpoint
from ckptfuse.formats.tensors import Box, Piece, Tensor, is_partition, tensor_bytes
from ckptfuse.formats.torch_zip import TORCH_DTYPES, Archive, Stored
from ckptfuse.formats.unpickling import MAX_PICKLE_SIZE, Admitted, unpickle
from ckptfuse.store import Reader, Store

METADATA = ".metadata"
#: The bytes at an item's start and end that hold the archive's pickle and directory.
_HEAD = _TAIL = 2 * 1024
_GAP = 64 * 1024  # a smaller one is cheaper to read than to leave out
_BLOCK = 4 * 1024 * 1024
_REMOTE_THREADS = 16


@dataclass(frozen=True, slots=True)
class Item:
    """One archive: ``length`` bytes from ``start`` of ``file``; a tensor's item holds a ``box``."""

    file: str
    start: int
    length: int
    box: Box | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of the state dict. ``dtype`` is None for an object that is no tensor.

    ``path`` are the keys that lead to it in the nested state dict: ("model", "layers.0.weight").
    """

    name: str
    path: tuple[str | int, ...]
    dtype: str | None
    shape: tuple[int, ...]
    items: tuple[Item, ...]


Entries = Mapping[str, Entry]


def read_metadata(store: Store, path: str, sizes: Mapping[str, int]) -> Entries:
    """Every name and where its items lie; ``sizes`` are those of the checkpoint's files.

    Raises IncompleteCheckpoint while a file is missing or short, DamagedCheckpoint.
    """
    where = f"{store.uri}/{path}"
    if sizes[path] > MAX_PICKLE_SIZE:
        raise DamagedCheckpoint(f"{where}: {sizes[path]} bytes are too many to be believed")
    parsed = unpickle(store.read(path), _ADMITTED, where)
    folder = path.removesuffix(METADATA)
    try:
        return _entries(parsed, folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"{where}: not a checkpoint's metadata: {error!r}") from error
    finally:
        del parsed


def check_files(entries: Entries, sizes: Mapping[str, int], uri: str) -> None:
    """Raise IncompleteCheckpoint unless every file is there and as long as its items need."""
    needed: dict[str, int] = {}
    for entry in entries.values():
        for item in entry.items:
            needed[item.file] = max(needed.get(item.file, 0), item.start + item.length)
    for file, length in sorted(needed.items()):
        if sizes.get(file, 0) < length:
            raise IncompleteCheckpoint(
                f"{uri}/{file}: {sizes.get(file, 'no')} bytes of {length} that .metadata names"
            )


def locate(store: Store, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """The tensors of these entries, each with the places of its bytes.

    Reads the start (of some also the end) of every item. Raises DamagedCheckpoint.
    """
    wanted = [entry for entry in entries if entry.dtype is not None]
    files: dict[str, list[tuple[str, Item]]] = {}
    for entry in wanted:
        for item in entry.items:
            files.setdefault(item.file, []).append((entry.name, item))
    threads = _REMOTE_THREADS if store.is_remote else 1
    pieces: dict[str, list[Piece]] = {entry.name: [] for entry in wanted}
    dtypes = {entry.name: entry.dtype for entry in wanted}
    known = _Known()
    with ThreadPoolExecutor(threads) as pool:
        for file, items in files.items():
            with store.reader(file) as reader:
                blocks = _Blocks(reader, _probes(item for _, item in items), pool)
                for name, item in items:
                    stored, start = known.look(item, blocks, f"{store.uri}/{file}: {name}")
                    _check_item(stored, dtypes[name], item, f"{store.uri}/{file}: {name}")
                    assert item.box is not None
                    pieces[name].append(Piece(file, item.start + start, item.box))
    return {
        entry.name: Tensor(entry.name, entry.dtype, entry.shape, tuple(pieces[entry.name]))
        for entry in wanted
        if entry.dtype is not None
    }


def _check_item(stored: Any, dtype: str | None, item: Item, where: str) -> None:
    if not isinstance(stored, Stored):
        raise DamagedCheckpoint(f"{where}: .metadata promises a tensor, which the item is not")
    assert item.box is not None
    if (stored.dtype, stored.shape) != (dtype, item.box.shape):
        raise DamagedCheckpoint(
            f"{where}: {stored.dtype} {list(stored.shape)} is stored where .metadata promises "
            f"{dtype} {list(item.box.shape)}"
        )


class _Known:
    """Archives that were read: another with the same first bytes is laid out in the same way.

    A run of ranks writes the same few shapes thousands of times; reading the directory of every
    archive would take seconds.
    """

    def __init__(self) -> None:
        self._heads: dict[tuple[int, Box | None], tuple[bytes, Any, int]] = {}

    def look(self, item: Item, blocks: "_Blocks", where: str) -> tuple[Any, int]:
        """What an item holds, and where in it the data begins."""
        shape = Box((), item.box.shape) if item.box else None
        known = self._heads.get((item.length, shape))
        if known is not None and blocks.fetch(item.start, known[2]) == known[0]:
            return known[1], known[2]

        def fetch(start: int, length: int) -> bytes | memoryview:
            return blocks.fetch(item.start + start, length)

        archive = Archive(fetch, item.length, where)
        stored = archive.object()
        start = archive.start_of(stored) if isinstance(stored, Stored) else 0
        self._heads[item.length, shape] = (bytes(blocks.fetch(item.start, start)), stored, start)
        return stored, start


class _Blocks:
    """Parts of a file that were read ahead; what lies outside of them is read when asked for."""

    def __init__(
        self, reader: Reader, ranges: Iterable[tuple[int, int]], pool: ThreadPoolExecutor
    ) -> None:
        self._reader = reader
        spans = _joined(ranges)
        self._blocks = list(
            zip(spans, pool.map(lambda span: self._read(*span), spans), strict=True)
        )
        self._at = 0

    def _read(self, start: int, end: int) -> bytes:
        data = bytearray(end - start)
        self._reader.read_into(start, memoryview(data))
        return bytes(data)

    def fetch(self, start: int, length: int) -> bytes | memoryview:
        for at in range(self._at, min(self._at + 3, len(self._blocks))):  # items come in order
            (begin, end), data = self._blocks[at]
            if begin <= start and start + length <= end:
                self._at = at
                return data[start - begin : start - begin + length]
        for (begin, end), data in self._blocks:
            if begin <= start and start + length <= end:
                return data[start - begin : start - begin + length]
        return self._read(start, start + length)


def _probes(items: Iterable[Item]) -> list[tuple[int, int]]:
    ranges = []
    for item in items:
        end = item.start + item.length
        ranges.append((item.start, min(item.start + _HEAD, end)))
        ranges.append((max(item.start, end - _TAIL), end))
    return ranges


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (start, end) that almost touch made one, up to a size."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if spans and start - spans[-1][1] <= _GAP and end - spans[-1][0] <= _BLOCK:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


class _Record:
    """Stands in for one of torch's dataclasses: holds whatever state the pickle gives it."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _entries(parsed: Any, folder: str) -> Entries:
    fields = parsed.state
    places: dict[str, list[Item]] = {}
    for index, info in fields["storage_data"].items():
        item = _item(index.state, info.state, folder)
        places.setdefault(index.state["fqn"], []).append(item)
    paths = fields.get("planner_data") or {}
    entries = {}
    for name, about in fields["state_dict_metadata"].items():
        if not isinstance(name, str):
            raise TypeError(f"a name that is no text: {name!r}")
        path = tuple(key if type(key) is int else str(key) for key in paths.get(name, (name,)))
        entries[name] = _entry(name, path, about.state, places.get(name, []))
    return entries


def _item(index: Mapping[str, Any], info: Mapping[str, Any], folder: str) -> Item:
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
        raise ValueError(f"{file!r} points outside of the checkpoint's folder")
    if info.get("transform_descriptors"):
        raise ValueError(f"{index['fqn']!r} is compressed ({info['transform_descriptors']})")
    if not all(type(n) is int and n >= 0 for n in (start, length)):
        raise ValueError(f"{index['fqn']!r} lies at {start!r}, {length!r}")
    offsets = index.get("offset")
    return Item(folder + file, start, length, None if offsets is None else Box(tuple(offsets), ()))


def _entry(name: str, path: tuple[str | int, ...], about: Any, found: list[Item]) -> Entry:
    if not (isinstance(about, dict) and "chunks" in about):
        return Entry(name, path, None, (), tuple(found))
    properties = about["properties"].state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    shape = tuple(about["size"])
    shapes = {tuple(c.state["offsets"]): tuple(c.state["sizes"]) for c in about["chunks"]}
    items = {}
    for item in found:
        offsets = item.box.offsets if item.box else (0,) * len(shape)
        items[offsets] = Item(item.file, item.start, item.length, Box(offsets, shapes[offsets]))
    boxes = [item.box for item in items.values() if item.box]
    if dtype not in TORCH_DTYPES.values() or len(items) != len(shapes):
        raise ValueError(f"{name!r}: {dtype!r}, {len(items)} items for {len(shapes)} chunks")
    if not is_partition(boxes, shape):
        raise ValueError(f"{name!r}: its chunks overlap or leave a gap in {list(shape)}")
    tensor_bytes(dtype, shape)
    return Entry(name, path, dtype, shape, tuple(items.values()))


def _first(*arguments: Any) -> Any:
    return arguments[0]


def _path(*parts: Any) -> str:
    return "/".join(map(str, parts))


_MODULE = "torch.distributed.checkpoint.metadata"
_FORMER = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
_ADMITTED: Admitted = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _first,
    ("pathlib", "PosixPath"): _path,
    ("pathlib._local", "PosixPath"): _path,  # Python 3.13
    (_MODULE, "_MEM_FORMAT_ENCODING"): _first,
    (_FORMER, "MEM_FORMAT_ENCODING"): _first,
    (_FORMER, "TensorProperties"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,  # of its own writer
    **{
        (_MODULE, name): _Record
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "StorageMeta",
        )
    },
    **{("torch", name): dtype for name, dtype in TORCH_DTYPES.items()},
}  # fmt: skip
