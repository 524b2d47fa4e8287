"""Which files a domain's path means: that file, or those in the folder with a name that we know.

The form of a file follows from its name: ``.jsonl`` (``.ndjson``, ``.json``: a JSON object a line),
``.txt`` and ``.md`` (a document a file), each also with ``.gz``, ``.zst`` or ``.bz2`` behind, and
``.parquet``. In a folder, names that begin with ``.`` or ``_`` (``_SUCCESS``) and files of other
forms are passed over. Unlike a bucket's, its links to folders are followed: a corpus is often put
together of them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckptfuse.errors import CorpusError, MissingFile
from ckptfuse.store import Entry, FolderStore, Store, is_s3, local_path, open_store, split_uri

Form = Literal["jsonl", "text", "parquet"]
_FORMS: dict[str, Form] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_ACCEPTED = f"{', '.join(_FORMS)} (all but Parquet also with {', '.join(_COMPRESSIONS)})"


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file of a domain. ``compression`` is pyarrow's name of the codec around it."""

    store: Store
    entry: Entry
    form: Form
    compression: str | None

    @property
    def uri(self) -> str:
        return f"{self.store.uri}/{self.entry.path}"


def find_files(uri: str) -> list[CorpusFile]:
    """The files of a path or S3 URI, in the order of their names; folders with all that is in them.

    Raises CorpusError when there is no such file, or none of a form that can be read.
    """
    if not _is_folder(uri):
        return [_single(uri)]
    store = open_store(uri)
    entries = [entry for entry in _all(store) if not _is_hidden(entry.path)]
    files = [file for entry in entries if (file := _as_file(store, entry))]
    if not entries:
        raise CorpusError(
            f"{uri}: no such corpus file, or an empty folder; correct corpus.domains or --corpus"
        )
    if not files:
        raise CorpusError(f"{uri}: of {len(entries)} files in this folder none is {_ACCEPTED}")
    return files


def _all(store: Store) -> list[Entry]:
    entries = list(store.list())
    for link in _links(store.root) if isinstance(store, FolderStore) else ():
        entries += [replace(e, path=f"{link}/{e.path}") for e in store.child(link).list()]
    return sorted(entries, key=lambda entry: entry.path)


def _links(root: Path) -> list[str]:
    """The links to folders under ``root`` and under what they lead to, as paths below ``root``.

    Without those to where another path leads already: so loops end, and no text is read twice.
    Raises CorpusError for what cannot be reached: elsewhere, with it, the corpus would be another.
    """
    links, seen, pending = [], set[str](), [root]
    while pending:
        top = pending.pop(0)
        if os.path.realpath(top) in seen:
            continue
        if top != root:
            links.append(top.relative_to(root).as_posix())
        for parent, names, files in os.walk(top, onerror=_refuse):
            seen.add(os.path.realpath(parent))
            _check_links(Path(parent), files)
            names[:] = sorted(name for name in names if not _is_hidden(name))  # walked in turn
            pending += [path for name in names if (path := Path(parent, name)).is_symlink()]
    return links


def _refuse(error: OSError) -> None:
    raise CorpusError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def _check_links(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        path = folder / name
        if _form(name) and not _is_hidden(name) and path.is_symlink() and not path.exists():
            raise CorpusError(f"{path}: a link to a file that is not there; mend or remove it")


def _is_folder(uri: str) -> bool:
    """On S3, whatever is no object: datasets have folders with names like ``part.parquet``, too."""
    if not is_s3(uri):
        return local_path(uri).is_dir()
    if _form(uri) is None:
        return True
    parent, name = split_uri(uri)
    try:
        open_store(parent).stat(name)
    except MissingFile:
        return True
    return False


def _single(uri: str) -> CorpusFile:
    parent, name = split_uri(uri)
    store = open_store(parent)
    try:
        file = _as_file(store, store.stat(name))
    except MissingFile as error:
        raise CorpusError(
            f"{uri}: no such corpus file; correct corpus.domains or --corpus"
        ) from error
    if file is None:
        raise CorpusError(f"{uri}: its name does not say what it is; accepted are {_ACCEPTED}")
    return file


def _as_file(store: Store, entry: Entry) -> CorpusFile | None:
    form = _form(entry.path)
    return form and CorpusFile(store, entry, *form)


def _form(name: str) -> tuple[Form, str | None] | None:
    path = Path(name.lower())
    compression = _COMPRESSIONS.get(path.suffix)
    form = _FORMS.get(path.with_suffix("").suffix if compression else path.suffix)
    return None if form is None or (form == "parquet" and compression) else (form, compression)


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))
