"""Where records lie, and how they are written and read.

``records/<kind>/<key>.json`` is named by what it describes and written atomically and once: the
same inputs give the same record, so writing one twice is harmless and a process can be killed
anywhere. Arrays lie beside a record as ``<key>.npz``, written before it: a record that is there
is whole.
"""

import io
import json
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ckptfuse.errors import MissingFile, RecordError
from ckptfuse.records import SCHEMA, AnyRecord, Record
from ckptfuse.store import Store

Arrays = dict[str, NDArray[Any]]


class Records:
    """The records under one store (``<workspace>/records``)."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._parsed: dict[tuple[type[Record], str], Record] = {}

    def get(self, kind: type[AnyRecord], key: str) -> AnyRecord | None:
        try:
            text = self.store.read(f"{kind.kind}/{key}.json")
        except MissingFile:
            return None
        return self._parse(kind, key, text)

    def put(self, key: str, record: Record, arrays: Arrays | None = None) -> None:
        """Write a record, unless one of its kind and key is there: the first one stands."""
        if self.has(type(record), key):
            return
        if arrays is not None:
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **arrays)
            self.store.write(f"{record.kind}/{key}.npz", buffer.getvalue())
        text = json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
        self.store.write(f"{record.kind}/{key}.json", text.encode())

    def has(self, kind: type[Record], key: str) -> bool:
        try:
            self.store.stat(f"{kind.kind}/{key}.json")
        except MissingFile:
            return False
        return True

    def written(self, kind: type[Record], key: str) -> float:
        """When a record was written, by its file: seconds since the epoch; raises MissingFile."""
        return self.store.stat(f"{kind.kind}/{key}.json").modified

    def arrays(self, kind: type[Record], key: str) -> Arrays:
        name = f"{kind.kind}/{key}.npz"
        data = io.BytesIO(self.store.read(name))
        try:
            with np.load(data, allow_pickle=False) as loaded:
                return {name: loaded[name] for name in loaded.files}
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise RecordError(
                f"{self.store.uri}/{name} is damaged: {error}. Take it from a backup, or remove it "
                f"and {key}.json: what they said is found, or decided, again"
            ) from error

    def keys(self, kind: type[Record]) -> frozenset[str]:
        """The keys of one kind; no record is read."""
        return frozenset(self._listed_keys(kind))

    def _listed_keys(self, kind: type[Record]) -> list[str]:
        start = len(kind.kind) + 1
        names = self.store.names(f"{kind.kind}/")
        return [name[start : -len(".json")] for name in names if name.endswith(".json")]

    def all(self, kind: type[AnyRecord]) -> dict[str, AnyRecord]:
        """Key -> record, of one kind, by key. A record never changes: each is read once."""
        return {key: self._known(kind, key) for key in sorted(self._listed_keys(kind))}

    def _known(self, kind: type[AnyRecord], key: str) -> AnyRecord:
        record = self._parsed.get((kind, key))
        if not isinstance(record, kind):
            record = self._parse(kind, key, self.store.read(f"{kind.kind}/{key}.json"))
            self._parsed[kind, key] = record
        return record

    def _parse(self, kind: type[AnyRecord], key: str, text: bytes) -> AnyRecord:
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RecordError(
                f"{self.store.uri}/{kind.kind}/{key}.json is not a {kind.kind} record of schema "
                f"{SCHEMA} ({where + ': ' if where else ''}{first['msg']}). Take it from a backup, "
                "or remove it: what it said is found, or decided, again"
            ) from error
