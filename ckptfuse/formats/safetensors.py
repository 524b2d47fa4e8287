"""The safetensors format, read and written by byte ranges.

A file is an 8-byte little-endian header length, a JSON header, then the tensors back to back::

    | n: u64 | header: n bytes of JSON | tensor data, no gaps |

Headers come from strangers, so they are bounded and checked before they are believed: no tensor
may overlap another, leave a gap, exceed the file, or claim a length that its shape does not have.
Format: https://huggingface.co/docs/safetensors (MAX_HEADER_SIZE 100 MB as upstream).
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from ckptfuse.errors import DamagedCheckpoint, IncompleteCheckpoint, MissingFile
from ckptfuse.formats.tensors import BITS, Tensor, tensor_bytes, whole_tensor
from ckptfuse.store import Store

MAX_HEADER_SIZE = 100_000_000
_PREFIX = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Header:
    """One file's tensors in the order of their bytes, and its free-text metadata."""

    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


def read_header(store: Store, file: str, size: int) -> Header:
    """Read and check one file's header; ``size`` is the file's length in bytes.

    Raises IncompleteCheckpoint when the file is shorter than its header says, DamagedCheckpoint
    when the header is not one.
    """
    where = f"{store.uri}/{file}"
    if size < _PREFIX.size:
        raise IncompleteCheckpoint(f"{where}: {size} bytes, no header yet")
    (header_size,) = _PREFIX.unpack(store.read_range(file, 0, _PREFIX.size))
    if not 2 <= header_size <= MAX_HEADER_SIZE:
        raise DamagedCheckpoint(
            f"{where}: claims a header of {header_size} bytes (2 to {MAX_HEADER_SIZE} are "
            "believed); this is not a safetensors file, or its start was overwritten"
        )
    data_start = _PREFIX.size + header_size
    if size < data_start:
        raise IncompleteCheckpoint(f"{where}: {size} bytes of at least {data_start}")
    tensors, metadata = _parse(where, store.read_range(file, _PREFIX.size, header_size))
    placed = _place(where, file, tensors, data_start)
    expected = data_start + sum(tensor.length for tensor in placed)
    if size < expected:
        raise IncompleteCheckpoint(f"{where}: {size} bytes of {expected}")
    if size > expected:
        raise DamagedCheckpoint(
            f"{where}: {size} bytes where its header describes {expected}; the file and its "
            "header do not belong together"
        )
    return Header(tuple(placed), metadata, data_start, size)


def _parse(
    where: str, text: bytes | bytearray
) -> tuple[dict[str, dict[str, object]], dict[str, str]]:
    try:
        parsed = json.loads(bytes(text).decode())  # of bytes, json would guess the encoding
        if not isinstance(parsed, dict):
            raise TypeError(f"a JSON {type(parsed).__name__}")
        metadata = parsed.pop("__metadata__", {})
        if not all(isinstance(value, dict) for value in [metadata, *parsed.values()]):
            raise TypeError("an entry that is no JSON object")
        # Metadata is text, and no name may hold half a surrogate pair: it could not be written.
        "".join([*parsed, *metadata, *metadata.values()]).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where}: the header is damaged: {error}") from error
    return parsed, metadata


def _place(
    where: str, file: str, tensors: Mapping[str, Mapping[str, object]], data_start: int
) -> list[Tensor]:
    """Check every entry against its neighbours; offsets become absolute."""
    placed = []
    for name, entry in tensors.items():
        dtype, shape, offsets = (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets"))
        if not (isinstance(dtype, str) and dtype in BITS):
            raise DamagedCheckpoint(f"{where}: tensor {name!r} has unknown dtype {dtype!r}")
        if not (_is_lengths(shape) and _is_lengths(offsets) and len(offsets) == 2):
            raise DamagedCheckpoint(f"{where}: tensor {name!r} has no usable shape and offsets")
        start, end = offsets
        bits = math.prod(shape) * BITS[dtype]
        if 8 * (end - start) != bits:
            raise DamagedCheckpoint(
                f"{where}: tensor {name!r} takes bytes {start} to {end}, but {dtype} {shape} has "
                f"{bits} bits"
            )
        placed.append((data_start + start, end - start, name, dtype, tuple(shape)))
    placed.sort()
    position = data_start
    for start, length, name, _, _ in placed:
        if start != position:
            raise DamagedCheckpoint(
                f"{where}: tensor {name!r} starts at byte {start}, where {position} was expected: "
                "tensors overlap or leave a gap"
            )
        position += length
    return [whole_tensor(name, dtype, shape, file, at) for at, _, name, dtype, shape in placed]


def _is_lengths(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a file that holds these (name, dtype, shape), in this order.

    Padded with spaces so that the data begins at a multiple of 8 bytes, as upstream writes it.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _PREFIX.pack(len(text)) + text


def read_index(store: Store, path: str) -> dict[str, str]:
    """Tensor name -> file name, from a ``*.index.json``; none may leave the folder."""
    where = f"{store.uri}/{path}"
    try:
        weight_map = json.loads(store.read(path))["weight_map"]
        files = set(weight_map.values())
    except MissingFile:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where}: not a weight index: {error!r}") from error
    for file in files:
        if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
            raise DamagedCheckpoint(f"{where}: {file!r} points outside of the checkpoint's folder")
    return dict(weight_map)
