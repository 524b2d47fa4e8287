"""The zip archives of ``torch.save``: where each tensor's bytes lie in them.

    archive/data.pkl      the object, with a persistent id where a storage belongs
    archive/data/0 ...    the storages, uncompressed

Both ``pytorch_model.bin`` and every item of a distributed checkpoint are such archives. Only the
pickle and the archive's directory are read; it is unpickled as unpickling.py says. Format:
torch/serialization.py.
"""

import io
import math
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptfuse.errors import DamagedCheckpoint
from ckptfuse.formats.tensors import BITS, tensor_bytes
from ckptfuse.formats.unpickling import MAX_PICKLE_SIZE, Admitted, unpickle

#: torch's names of dtypes, and of their storages, by the names of safetensors.
TORCH_DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
    "int32": "I32", "uint64": "U64", "int64": "I64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16",
    "IntStorage": "I32", "LongStorage": "I64", "ComplexFloatStorage": "C64",
}  # fmt: skip

#: ``fetch(start, length)``: these bytes of the archive.
Fetch = Callable[[int, int], bytes | bytearray | memoryview]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in an archive: its storage's key, and where in the storage it begins, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    storage: str
    offset: int


@dataclass(frozen=True, slots=True)
class _Storage:
    """``dtype`` is None for bytes of no type of their own."""

    key: str
    dtype: str | None


class Archive:
    """One archive of ``size`` bytes, read through ``fetch``; raises DamagedCheckpoint."""

    def __init__(self, fetch: Fetch, size: int, where: str) -> None:
        self._fetch = fetch
        self._size = size
        self._where = where
        try:
            archive = zipfile.ZipFile(_File(fetch, size))
        except _DAMAGE as error:
            raise DamagedCheckpoint(
                f"{where}: not an archive of torch.save ({error}); files from before torch 1.6 "
                "are not read: load and save them once more"
            ) from error
        self._entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}

    def object(self) -> Any:
        """What was saved: plain values, with a Stored for each tensor."""
        info = self._entry("data.pkl")
        if info.file_size > MAX_PICKLE_SIZE or info.compress_type != zipfile.ZIP_STORED:
            raise DamagedCheckpoint(f"{self._where}: data.pkl is compressed or too large")
        start = self._data_start(info)
        data = self._take(start, info.file_size)
        return unpickle(data, _admitted(self._where), self._where, self._storage)

    def start_of(self, tensor: Stored) -> int:
        """The first byte of a tensor's data in the archive, all of which is there."""
        info = self._entry(f"data/{tensor.storage}")
        length = tensor_bytes(tensor.dtype, tensor.shape)
        if info.compress_type != zipfile.ZIP_STORED or tensor.offset + length > info.file_size:
            raise DamagedCheckpoint(
                f"{self._where}: a tensor takes {length} bytes from {tensor.offset} of storage "
                f"{tensor.storage}, which has {info.file_size} (or is compressed)"
            )
        start = self._data_start(info) + tensor.offset
        if start + length > self._size:
            raise DamagedCheckpoint(f"{self._where}: storage {tensor.storage} ends behind it")
        return start

    def _entry(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._entries[name]
        except KeyError:
            raise DamagedCheckpoint(f"{self._where}: the archive has no {name}") from None

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        """Behind the entry's local header, whose name and padding have lengths of their own."""
        header = self._take(info.header_offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise DamagedCheckpoint(f"{self._where}: {info.filename} has no local header")
        return int(info.header_offset) + 30 + int(sum(struct.unpack("<HH", header[26:30])))

    def _take(self, start: int, length: int) -> bytes:
        if start < 0 or start + length > self._size:
            raise DamagedCheckpoint(f"{self._where}: the archive's directory points outside of it")
        return bytes(self._fetch(start, length))

    def _storage(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, _Storage) or not isinstance(key, str):
            raise DamagedCheckpoint(f"{self._where}: a persistent id that names no storage")
        return _Storage(key, dtype.dtype)


_DAMAGE = (
    zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, ValueError, OSError, EOFError,
    NotImplementedError, RuntimeError, KeyError, IndexError, TypeError, OverflowError,
)  # fmt: skip


class _File(io.RawIOBase):
    """What ``zipfile`` needs of a file: to seek, and to read from there."""

    def __init__(self, fetch: Fetch, size: int) -> None:
        super().__init__()
        self._fetch = fetch
        self._size = size
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a place before the start of the file")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        length = left if size is None or size < 0 else min(size, left)
        if length > MAX_PICKLE_SIZE:
            raise OSError(f"a directory of {length} bytes")
        data = bytes(self._fetch(self._position, length)) if length else b""
        self._position += length
        return data


def _admitted(where: str) -> Admitted:
    """What torch.save names for tensors of plain dtypes, and nothing else."""

    def rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Stored:
        dtype = rest[2] if storage.dtype is None else storage.dtype  # version 3 brings it along
        return _stored(where, storage.key, dtype, offset, shape, stride)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("torch._utils", "_rebuild_tensor_v3"): rebuild,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch", "Size"): tuple,
        ("torch.storage", "UntypedStorage"): _Storage("", None),
        **{("torch", name): _Storage("", dtype) for name, dtype in _STORAGES.items()},
        **{("torch", name): dtype for name, dtype in TORCH_DTYPES.items()},
    }


def _stored(where: str, key: str, dtype: Any, offset: Any, shape: Any, stride: Any) -> Stored:
    if not (dtype in BITS and _is_lengths(shape) and _is_lengths(stride) and _is_lengths([offset])):
        raise DamagedCheckpoint(f"{where}: a tensor of dtype {dtype!r} and shape {shape!r}")
    shape = tuple(shape)
    expected = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    moved = len(stride) != len(shape) or any(
        n > 1 and a != b for n, a, b in zip(shape, stride, expected, strict=True)
    )
    if moved and math.prod(shape):
        raise DamagedCheckpoint(
            f"{where}: a tensor of shape {list(shape)} is stored with strides {list(stride)}; save "
            "it as .contiguous()"
        )
    return Stored(dtype, shape, key, offset * BITS[dtype] // 8)


def _is_lengths(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(n) is int and n >= 0 for n in value)


def state_dict(saved: Any, where: str) -> Mapping[str, Stored]:
    """The tensors of a saved state dict, by name."""
    if not isinstance(saved, dict) or not saved:
        raise DamagedCheckpoint(f"{where}: no state dict, but {type(saved).__name__}")
    for name, value in saved.items():
        if not isinstance(name, str) or not isinstance(value, Stored):
            raise DamagedCheckpoint(
                f"{where}: {name!r} is no tensor; only a plain state dict is read"
            )
    return saved
