"""What a checkpoint is: which files make it up, and what its bytes are."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ckptfuse.digests import digest
from ckptfuse.errors import (
    ChangedCheckpoint,
    ConfigurationError,
    IncompleteCheckpoint,
    MissingFile,
)
from ckptfuse.formats import safetensors
from ckptfuse.names import ParsedName, parse_name
from ckptfuse.store import Entry, Store, is_s3, open_store

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
#: Weight formats of one folder, as transformers chooses between them: single file, index.
FORMATS = ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX))
#: The file that ends a distributed checkpoint, at the top or one folder below (OLMo-core).
METADATA = ".metadata"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = frozenset(
    [
        TOKENIZER_CONFIG,
        "tokenizer.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tekken.json",
        "chat_template.jinja",
        "chat_template.json",
    ]
)
#: Vocabularies whose names differ from one tokenizer to the next (SentencePiece, tiktoken).
VOCABULARIES = (".model", ".tiktoken")
#: Keys of config.json that may differ between checkpoints of one architecture.
VOLATILE_CONFIG = frozenset(
    ["_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype"]
)
#: What configurations call the positions that their models know: most; GPT-2; MPT.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")

#: A checkpoint's files: path -> (size, content hash).
Contents = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Checkpoint:
    """One complete saved state. ``files`` are those that its identity covers."""

    name: str
    uri: str
    step: int
    stage: str | None
    tokens: int | None
    files: tuple[Entry, ...]

    @cached_property
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


def open_checkpoint(uri: str, signature: str | None = None) -> Checkpoint:
    """The checkpoint at a local path or S3 URI.

    Raises IncompleteCheckpoint, MissingFile, or ChangedCheckpoint when a ``signature`` is given
    and the files are no longer those that had it.
    """
    store = open_store(uri)
    name = store.uri.rstrip("/").rpartition("/")[2]
    parsed = parse_name(name) or ParsedName(step=0)
    entries = store.list("")
    if not entries:
        raise MissingFile(f"{store.uri}: no files there; a checkpoint folder was expected")
    checkpoint = assemble(store, name, parsed, entries)
    if signature is not None and checkpoint.signature != signature:
        raise ChangedCheckpoint(f"{store.uri}: its files were written again since they were listed")
    return checkpoint


def config_identity(config: Mapping[str, object]) -> dict[str, object]:
    """config.json without what does not change the function that the weights compute.

    As JSON proper: NaN and Infinity, which transformers writes (Mamba's time_step_limit), by name.
    """
    return {key: _proper(value) for key, value in config.items() if key not in VOLATILE_CONFIG}


def _proper(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _proper(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_proper(part) for part in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def longest_context(config: Mapping[str, object]) -> int | None:
    """The positions that a configuration's model knows; None where it names no such limit."""
    text = config.get("text_config")
    if isinstance(text, Mapping):  # a model of text and images
        return longest_context(text)
    named = (config.get(key) for key in POSITIONS)
    return next((n for n in named if isinstance(n, int) and n > 0), None)


def fingerprint(contents: Mapping[str, tuple[int, str]]) -> str:
    """A checkpoint's identity from its files: path -> (size, content hash)."""
    return digest(sorted([path, size, content] for path, (size, content) in contents.items()))


def assemble(store: Store, name: str, parsed: ParsedName, entries: Iterable[Entry]) -> Checkpoint:
    present = {entry.path: entry for entry in entries}
    if distributed_metadata(present) is not None:  # whatever lies beside it, a resume may need
        return checkpoint_of(store, name, parsed, sorted(entries, key=lambda entry: entry.path))
    if CONFIG not in present:
        raise IncompleteCheckpoint(f"{store.uri}: no {CONFIG} yet")
    weights = _weight_files(store, present)
    paths = sorted(weights | {path for path in present if is_ancillary(path)})
    return checkpoint_of(store, name, parsed, [present[path] for path in paths])


def checkpoint_of(
    store: Store, name: str, parsed: ParsedName, files: Iterable[Entry]
) -> Checkpoint:
    return Checkpoint(name, store.uri, parsed.step, parsed.stage, parsed.tokens, tuple(files))


def is_identity(path: str) -> bool:
    indexes = {index for _, index in FORMATS}
    return is_ancillary(path) or path in indexes or path.endswith((".safetensors", ".bin"))


def is_ancillary(path: str) -> bool:
    """Whether a small file belongs to the model and travels with a fusion."""
    return path in (CONFIG, GENERATION_CONFIG) or is_tokenizer(path) or is_code(path)


def read_ancillary(store: Store) -> dict[str, bytes]:
    """The configuration, tokenizer and code of the model in this folder: path -> content."""
    return {e.path: store.read(e.path) for e in store.list("") if is_ancillary(e.path)}


def is_tokenizer(path: str) -> bool:
    return path in TOKENIZER_FILES or (path.endswith(VOCABULARIES) and "/" not in path)


def is_code(path: str) -> bool:
    """Whether it is Python of a model that transformers does not know (auto_map)."""
    return path.endswith(".py") and "/" not in path


def _weight_files(store: Store, present: Mapping[str, Entry]) -> set[str]:
    """The single file, or the index and its shards, as transformers chooses between them."""
    for single, index in FORMATS:
        if single in present:
            return {single}
        if index in present:
            return _shards(store, index, present) | {index}
    raise IncompleteCheckpoint(
        f"{store.uri}: no {SINGLE}, no {BIN_SINGLE}, no index of either and no {METADATA} of a "
        "distributed checkpoint yet"
    )


def _shards(store: Store, index: str, present: Mapping[str, Entry]) -> set[str]:
    shards = set(safetensors.read_index(store, index).values())
    missing = sorted(shards - present.keys())
    if missing:
        raise IncompleteCheckpoint(
            f"{store.uri}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}"
        )
    return shards


def distributed_metadata(paths: Iterable[str]) -> str | None:
    """The path of a distributed checkpoint's ``.metadata``; None for any other format.

    Weights in a format of Hugging Face's go first. Accelerate writes the optimizer's state as a
    second distributed checkpoint beside the model's.
    """
    names = list(paths)
    if any(name in files for files in FORMATS for name in names):
        return None
    found = [
        path
        for path in sorted(names)
        if path.rpartition("/")[2] == METADATA
        and path.count("/") <= 1
        and not path.startswith("optim")
    ]
    return found[0] if found else None


def check_bucket_uri(uri: str | None) -> str:
    """The bucket's URI, or a ConfigurationError that says how to set it."""
    if not uri:
        raise ConfigurationError(
            "no bucket: set `bucket` in params.yaml or CKPTFUSE_BUCKET to the folder or "
            "s3:// prefix that the trainer writes its checkpoints to"
        )
    return uri if is_s3(uri) else open_store(uri).uri
