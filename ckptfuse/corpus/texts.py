"""The documents of one file, one after another, whatever its size.

A file is read through its store in ranges, never as a whole: of a Parquet file only the column of
the text, of a compressed one what the decoder asks for next. Memory holds a text, and a row group's
page of a Parquet column.
"""

import io
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from ckptfuse.corpus.documents import Document, of_line
from ckptfuse.corpus.files import CorpusFile
from ckptfuse.errors import CorpusError
from ckptfuse.store import Reader

_BUFFER = 8 * 1024 * 1024
#: Rows of Parquet that are decoded at once.
_ROWS = 64
#: Characters.
_QUOTED = 300


def read_documents(
    file: CorpusFile, field: str, *, read: Callable[[int], None] = lambda size: None
) -> Iterator[Document]:
    """The documents of a file, empty ones and nulls left out; ``read`` is told of bytes that came.

    ``field`` names the text in a JSON object, and the column in Parquet. Raises CorpusError naming
    the file, and the line or the column, that cannot be used.
    """
    with file.store.reader(file.entry.path) as reader:
        raw = _Bytes(reader, file.entry.size, read)
        found = _of_parquet if file.form == "parquet" else _of_stream
        yield from (document for document in found(file, raw, field) if document and document.text)


def _of_stream(file: CorpusFile, raw: "_Bytes", field: str) -> Iterator[Document | None]:
    stream = io.BufferedReader(raw, _BUFFER)
    if file.compression is None:
        yield from _of_bytes(file, stream, field)
        return
    import pyarrow as pa

    decoded = pa.CompressedInputStream(pa.PythonFile(stream, "r"), file.compression)
    try:
        yield from _of_bytes(file, io.BufferedReader(decoded, _BUFFER), field)
    except OSError as error:
        raise CorpusError(
            f"{file.uri}: cannot be decompressed ({_quoted(error)}); is it whole, and as it is "
            "named?"
        ) from error


def _of_bytes(file: CorpusFile, stream: BinaryIO, field: str) -> Iterator[Document | None]:
    if file.form == "jsonl":
        yield from _of_lines(file.uri, stream, field)
        return
    try:
        yield Document.of(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file.uri}: not UTF-8 text: {error}") from error


def _of_lines(uri: str, stream: BinaryIO, field: str) -> Iterator[Document | None]:
    # Only \n ends a line: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{uri}, line {number}: not UTF-8 text: {error}") from error
        if text.strip():
            yield _of_line(text, field, f"{uri}, line {number}")


def _of_line(line: str, field: str, where: str) -> Document | None:
    try:
        return of_line(json.loads(line), field)
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: character {error.start + 1:,} of the text is half of a pair of surrogates "
            f"(U+{ord(error.object[error.start]):04X}), which is no character and has no UTF-8; "
            "correct the text or take it out"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorpusError(
            f'{where}: expected a JSON object with a string "{field}": {_quoted(repr(error))}; '
            "another name of the text is set by corpus.domains.NAME.field (--field)"
        ) from error


def _of_parquet(file: CorpusFile, raw: "_Bytes", field: str) -> Iterator[Document | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    uri = file.uri
    try:
        # Buffered before it is asked for, the column would be in memory for all row groups at once.
        table = pq.ParquetFile(pa.PythonFile(raw, "r"), buffer_size=_BUFFER, pre_buffer=False)
        _check_column(uri, table.schema_arrow, field)
        for batch in table.iter_batches(batch_size=_ROWS, columns=[field], use_threads=False):
            yield from (Document.of(text) for text in batch.column(0).to_pylist() if text)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{uri}, column {field!r}: not UTF-8 text: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{uri}, column {field!r}: cannot be read as Parquet: {_quoted(error)}; is it whole?"
        ) from error


def _check_column(uri: str, schema: Any, field: str) -> None:
    import pyarrow.types as types

    if field not in schema.names:
        raise CorpusError(
            f"{uri}: no column {field!r}; set corpus.domains.NAME.field (--field) to the one that "
            f"holds the text: {_quoted(', '.join(schema.names))}"
        )
    kind = schema.field(field).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    are_strings = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(are(value) for are in are_strings):
        raise CorpusError(
            f"{uri}, column {field!r}: strings are expected, it holds {_quoted(kind)}"
        )


def _quoted(what: object) -> str:
    """For a message: columns can be thousands, and others' errors can hold what they read."""
    text = str(what)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]} ..."


class _Bytes(io.RawIOBase):
    """A store's file as Python's own kind of stream."""

    def __init__(self, reader: Reader, size: int, read: Callable[[int], None]) -> None:
        self._reader = reader
        self._size = size
        self._read = read
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        if len(view):
            self._reader.read_into(self._at, view)
        self._at += len(view)
        self._read(len(view))
        return len(view)
