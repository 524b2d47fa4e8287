"""What a checkpoint is: which files make it up, when it is complete, and what its bytes are.

A folder of a bucket becomes a checkpoint in three looks, each cheaper than the next::

    its name parses  ->  its files are there and settled  ->  every header fits its file

Only then does it count. Nothing here reads weights: headers come by ranged reads.
"""

import json
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ckptfuse.digests import digest
from ckptfuse.errors import (
    ChangedCheckpoint,
    ConfigurationError,
    DamagedCheckpoint,
    IncompleteCheckpoint,
    MissingFile,
)
from ckptfuse.formats import safetensors
from ckptfuse.names import ParsedName, parse_name
from ckptfuse.store import Entry, FolderStore, Store, is_s3, open_store

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER_FILES = frozenset(
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "chat_template.jinja",
        "chat_template.json",
    ]
)
#: Small files that belong to the model and travel with a fusion.
ANCILLARY_FILES = frozenset({CONFIG, "generation_config.json"}) | TOKENIZER_FILES
#: Keys of config.json that may differ between checkpoints of one architecture.
VOLATILE_CONFIG = frozenset(
    ["_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype"]
)

#: A checkpoint's files: path -> (size, content hash).
Contents = dict[str, tuple[int, str]]

#: The file that the Hugging Face Trainer writes last.
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One complete saved state. ``files`` are those that its identity covers."""

    name: str
    uri: str
    step: int
    stage: str | None
    tokens: int | None
    files: tuple[Entry, ...]

    @property
    def signature(self) -> str:
        """Digest of name, sizes and versions: remembers a fingerprint without being one."""
        return digest(
            [self.name, [[entry.path, entry.size, entry.version] for entry in self.files]]
        )

    @property
    def modified(self) -> float:
        return max(entry.modified for entry in self.files)

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files)

    def store(self) -> Store:
        return open_store(self.uri)


@dataclass(frozen=True, slots=True)
class Refused:
    """A folder with a checkpoint's name that is not (yet) one, and why."""

    checkpoint: Checkpoint
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a bucket holds now: complete checkpoints by step, and those that do not count."""

    complete: tuple[Checkpoint, ...] = ()
    incomplete: tuple[Refused, ...] = ()
    damaged: tuple[Refused, ...] = ()
    #: Signature -> architecture, of the checkpoints whose headers were read in this look.
    architectures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Every tensor's place, and the configuration, of one checkpoint."""

    checkpoint: Checkpoint
    headers: Mapping[str, safetensors.Header]
    config: Mapping[str, object]

    @cached_property
    def tensors(self) -> dict[str, safetensors.Tensor]:
        """Tensor name -> place, in the order of the bytes of each file in turn."""
        placed = (tensor for header in self.headers.values() for tensor in header.tensors)
        return {tensor.name: tensor for tensor in placed}

    @property
    def architecture(self) -> str:
        """Digest of tensor names, dtypes and shapes: equal where checkpoints can be merged."""
        return digest(sorted([t.name, t.dtype, list(t.shape)] for t in self.tensors.values()))


@dataclass(frozen=True, slots=True)
class Conventions:
    """How a team's trainer names and finishes its checkpoints."""

    pattern: str | None = None
    marker: str | None = None
    settle_seconds: float = 30.0
    known: Container[str] = field(default_factory=frozenset)


def find(bucket: Store, conventions: Conventions) -> Listing:
    """List a bucket and sort its checkpoint folders into complete, incomplete and damaged.

    Checkpoints whose signature is in ``conventions.known`` were looked into before; their headers
    are not read again, so an unchanged bucket costs one listing.
    """
    complete: list[Checkpoint] = []
    incomplete: list[Refused] = []
    damaged: list[Refused] = []
    architectures: dict[str, str] = {}
    for name, parsed, entries in _folders(bucket, conventions.pattern):
        store = bucket.child(name)
        checkpoint = _of(store, name, parsed, [e for e in entries if _is_identity(e.path)])
        try:
            _check_settled(entries, conventions, local=isinstance(bucket, FolderStore))
            checkpoint = _assemble(store, name, parsed, entries)
            if checkpoint.signature not in conventions.known:
                architectures[checkpoint.signature] = read_layout(checkpoint).architecture
            complete.append(checkpoint)
        except (IncompleteCheckpoint, MissingFile) as error:
            incomplete.append(Refused(checkpoint, str(error)))
        except DamagedCheckpoint as error:
            damaged.append(Refused(checkpoint, str(error)))
    complete.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.name))
    return Listing(tuple(complete), tuple(incomplete), tuple(damaged), architectures)


def open_checkpoint(uri: str, signature: str | None = None) -> Checkpoint:
    """The checkpoint at a local path or S3 URI.

    Raises IncompleteCheckpoint, MissingFile, or ChangedCheckpoint when a ``signature`` is given
    and the files are no longer those that had it.
    """
    store = open_store(uri)
    name = store.uri.rstrip("/").rpartition("/")[2]
    parsed = parse_name(name) or ParsedName(step=0)
    entries = [entry for entry in store.list("") if "/" not in entry.path]
    if not entries:
        raise MissingFile(f"{store.uri}: no files there; a checkpoint folder was expected")
    checkpoint = _assemble(store, name, parsed, entries)
    if signature is not None and checkpoint.signature != signature:
        raise ChangedCheckpoint(f"{store.uri}: its files were written again since they were listed")
    return checkpoint


def read_layout(checkpoint: Checkpoint) -> Layout:
    """Read and check every header; raises IncompleteCheckpoint or DamagedCheckpoint."""
    store = checkpoint.store()
    sizes = {entry.path: entry.size for entry in checkpoint.files}
    files = sorted(path for path in sizes if path.endswith(".safetensors"))
    headers = {file: safetensors.read_header(store, file, sizes[file]) for file in files}
    layout = Layout(checkpoint, headers, _read_config(store))
    count = sum(len(header.tensors) for header in headers.values())
    if count != len(layout.tensors):
        raise DamagedCheckpoint(f"{checkpoint.uri}: the same tensor lies in two of its files")
    if INDEX in sizes:
        _check_index(store, layout)
    return layout


def config_identity(config: Mapping[str, object]) -> dict[str, object]:
    """config.json without what does not change the function that the weights compute."""
    return {key: value for key, value in config.items() if key not in VOLATILE_CONFIG}


def fingerprint(contents: Mapping[str, tuple[int, str]]) -> str:
    """A checkpoint's identity from its files: path -> (size, content hash)."""
    return digest(sorted([path, size, content] for path, (size, content) in contents.items()))


def _folders(bucket: Store, pattern: str | None) -> Iterator[tuple[str, ParsedName, list[Entry]]]:
    """Top-level folders with a checkpoint's name, and their direct files (paths relative)."""
    folders: dict[str, list[Entry]] = {}
    for entry in bucket.list(""):
        name, _, path = entry.path.partition("/")
        if path and "/" not in path:
            relative = Entry(path, entry.size, entry.version, entry.modified)
            folders.setdefault(name, []).append(relative)
    for name, entries in folders.items():
        parsed = parse_name(name, pattern)
        if parsed is not None:
            yield name, parsed, entries


def _assemble(store: Store, name: str, parsed: ParsedName, entries: Iterable[Entry]) -> Checkpoint:
    present = {entry.path: entry for entry in entries}
    if CONFIG not in present:
        raise IncompleteCheckpoint(f"{store.uri}: no {CONFIG} yet")
    weights = _weight_files(store, present)
    paths = sorted(weights | (ANCILLARY_FILES & present.keys()))
    return _of(store, name, parsed, [present[path] for path in paths])


def _of(store: Store, name: str, parsed: ParsedName, files: Iterable[Entry]) -> Checkpoint:
    return Checkpoint(name, store.uri, parsed.step, parsed.stage, parsed.tokens, tuple(files))


def _is_identity(path: str) -> bool:
    return path in ANCILLARY_FILES | {INDEX} or path.endswith(".safetensors")


def _weight_files(store: Store, present: Mapping[str, Entry]) -> set[str]:
    """The single file, or the index and its shards, as transformers chooses between them."""
    if SINGLE in present:
        return {SINGLE}
    if INDEX not in present:
        raise IncompleteCheckpoint(
            f"{store.uri}: no {SINGLE} and no {INDEX} yet (safetensors weights are read)"
        )
    shards = set(safetensors.read_index(store, INDEX).values())
    missing = sorted(shards - present.keys())
    if missing:
        raise IncompleteCheckpoint(
            f"{store.uri}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}"
        )
    return shards | {INDEX}


def _check_settled(entries: list[Entry], conventions: Conventions, *, local: bool) -> None:
    """Raise IncompleteCheckpoint while the trainer may still be adding files.

    A marker of the team's choice decides when there is one. In a folder, the Trainer's state file
    is written last, so nothing newer than it means done. Otherwise files must have been quiet for
    a while: uploads arrive in any order.
    """
    present = {entry.path: entry for entry in entries}
    newest = max(entry.modified for entry in entries)
    if conventions.marker is not None:
        if conventions.marker not in present:
            raise IncompleteCheckpoint(f"waiting for the marker file {conventions.marker!r}")
        return
    if local and TRAINER_STATE in present and present[TRAINER_STATE].modified >= newest:
        return
    quiet = time.time() - newest
    if quiet < conventions.settle_seconds:
        raise IncompleteCheckpoint(
            f"last written {max(quiet, 0):.0f} s ago; counts after {conventions.settle_seconds:g} "
            "s of quiet (watch.settle_seconds)"
        )


def _read_config(store: Store) -> Mapping[str, object]:
    try:
        config = json.loads(store.read(CONFIG))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{store.uri}/{CONFIG}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DamagedCheckpoint(f"{store.uri}/{CONFIG}: not a JSON object")
    return config


def _check_index(store: Store, layout: Layout) -> None:
    weight_map = safetensors.read_index(store, INDEX)
    for name, file in weight_map.items():
        if name not in layout.tensors or layout.tensors[name].file != file:
            raise DamagedCheckpoint(
                f"{store.uri}/{INDEX}: names tensor {name!r} in {file}, which does not hold it"
            )


def check_bucket_uri(uri: str | None) -> str:
    """The bucket's URI, or a ConfigurationError that says how to set it."""
    if not uri:
        raise ConfigurationError(
            "no bucket: set `bucket` in params.yaml or CKPTFUSE_BUCKET to the folder or "
            "s3:// prefix that the trainer writes its checkpoints to"
        )
    return uri if is_s3(uri) else open_store(uri).uri
