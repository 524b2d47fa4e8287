"""Token blocks: the documents of one split, tokenised once and packed into equal contexts.

Documents follow one another, each preceded by the tokenizer's begin-of-sequence token (or its
end-of-sequence token when it has no other), and the stream is cut into contexts of L tokens::

    stream    B d d d d B d d B d d d d d d
    context 0 |---------|
    context 1         |---------|            the last token of one is the first of the next,
    context 2                 |-----|        so every token but the stream's first is predicted once

No token is padded; the last context of a domain may be shorter. Blocks are stored as
memory-mapped arrays in a folder named by their digest.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptfuse.checkpoints import TOKENIZER_FILES
from ckptfuse.corpus import Document
from ckptfuse.digests import content_digest, digest
from ckptfuse.errors import CorpusError
from ckptfuse.store import Store

_ARRAYS = ("tokens", "starts", "lengths", "domain", "document", "bytes")


@dataclass(frozen=True)
class Blocks:
    """Contexts to score, grouped by domain.

    ``tokens`` int32 [T] is the stream; block b is ``tokens[starts[b] : starts[b] + lengths[b]]``
    and predicts all of its tokens but the first. ``domain`` int32 [B] indexes ``domains``;
    ``document`` int32 [B] is the document that most of the block's predicted tokens come from:
    the cluster of standard errors; ``bytes`` int64 [B] counts the UTF-8 bytes of the predicted
    tokens.
    """

    digest: str
    domains: tuple[str, ...]
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    domain: NDArray[np.int32]
    document: NDArray[np.int32]
    bytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """Predicted tokens of each block, int64 [B]."""
        return self.lengths.astype(np.int64) - 1

    def block(self, index: int) -> NDArray[np.int32]:
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A Hugging Face tokenizer and the digest of its files."""

    encode_with_offsets: Any
    separator: int | None  # the token between documents
    digest: str


def block_digest(*, corpus: str, tokenizer: str, split: str, block_length: int, bos: str) -> str:
    """Names a set of blocks by all that decides it, before any text is tokenised."""
    return digest(["packed-1", corpus, tokenizer, split, block_length, bos])


def tokenizer_files_digest(store: Store) -> str | None:
    """Digest of the tokenizer files in a folder; None when there are none. Small reads only."""
    contents = []
    for entry in store.list(""):
        if entry.path in TOKENIZER_FILES:
            contents.append([entry.path, entry.size, content_digest(store.read(entry.path))])
    return digest(contents) if contents else None


def load_tokenizer(store: Store) -> Tokenizer:
    """The tokenizer that lies in a folder or S3 prefix; raises CorpusError when there is none."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    digest_ = tokenizer_files_digest(store)
    if digest_ is None:
        raise CorpusError(
            f"{store.uri}: no tokenizer; set corpus.tokenizer in params.yaml (or --tokenizer) "
            "to a folder that has them"
        )
    transformers_logging.set_verbosity_error()  # "sequence longer than ...": we cut it ourselves
    with tempfile.TemporaryDirectory() as folder:
        for entry in store.list(""):
            if entry.path in TOKENIZER_FILES or entry.path == "config.json":
                Path(folder, entry.path).write_bytes(store.read(entry.path))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise CorpusError(f"{store.uri}: the tokenizer cannot be loaded: {error}") from error
    separator = tokenizer.bos_token_id
    if separator is None:
        separator = tokenizer.eos_token_id

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        fast = bool(tokenizer.is_fast)
        answer = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
        return answer["input_ids"], answer["offset_mapping"] if fast else None

    return Tokenizer(encode, separator, digest_)


def build(
    documents: Mapping[str, Sequence[Document]],
    tokenizer: Tokenizer,
    *,
    digest: str,
    block_length: int,
    bos: str = "document",
    tokens: Mapping[str, int] | None = None,
    tokens_per_document: int | None = None,
) -> Blocks:
    """Tokenise and pack each domain's documents, up to its ``tokens`` if there are such.

    Raises CorpusError naming a domain that yields nothing to predict.
    """
    separator = tokenizer.separator if bos == "document" else None
    parts = []
    for code, (name, texts) in enumerate(documents.items()):
        budget = tokens[name] if tokens is not None else None
        stream = _stream(texts, tokenizer, separator, budget, tokens_per_document)
        if len(stream[0]) < 2:
            raise CorpusError(
                f"domain {name!r} has {len(texts)} documents in this split and nothing to predict; "
                "give it more text or a larger share"
            )
        parts.append(_pack(*stream, code=code, block_length=block_length))
    offsets = np.cumsum([0] + [len(part["tokens"]) for part in parts[:-1]])
    documents_before = np.cumsum([0] + [int(part["document"].max()) + 1 for part in parts[:-1]])
    for part, offset, before in zip(parts, offsets, documents_before, strict=True):
        part["starts"] += offset
        part["document"] += before
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in _ARRAYS}
    return Blocks(digest, tuple(documents), **arrays)


def _stream(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    separator: int | None,
    budget: int | None,
    per_document: int | None,
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """Tokens, UTF-8 bytes of each token, and index of each token's document."""
    tokens, sizes, owners = [], [], []
    total = 0
    for index, document in enumerate(documents):
        if budget is not None and total >= budget:
            break
        ids, byte_counts = _encode(document.text, tokenizer)
        if separator is not None:
            ids, byte_counts = [separator, *ids], np.concatenate([[0], byte_counts])
        keep = min(
            len(ids),
            per_document if per_document is not None else len(ids),
            budget - total if budget is not None else len(ids),
        )
        tokens.append(np.asarray(ids[:keep], dtype=np.int32))
        sizes.append(byte_counts[:keep].astype(np.int64))
        owners.append(np.full(keep, index, dtype=np.int32))
        total += keep
    if not tokens:
        return np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int32)
    return np.concatenate(tokens), np.concatenate(sizes), np.concatenate(owners)


def _encode(text: str, tokenizer: Tokenizer) -> tuple[list[int], NDArray[np.int64]]:
    """Token ids and the bytes of text that each stands for, which sum to the text's bytes.

    A token's bytes reach from the furthest end before it to its own end, so that pieces of one
    character do not count it twice and skipped white space counts with the token after it.
    """
    ids, offsets = tokenizer.encode_with_offsets(text)
    if not ids:
        return ids, np.empty(0, np.int64)
    if offsets is None:  # a slow tokenizer has no offsets: spread the bytes evenly
        ends = np.linspace(0, len(text.encode()), len(ids) + 1).astype(np.int64)[1:]
    else:
        byte_ends = _byte_positions(text)
        ends = byte_ends[np.maximum.accumulate([end for _, end in offsets])]
        ends[-1] = byte_ends[-1]
    return ids, np.diff(ends, prepend=0)


def _byte_positions(text: str) -> NDArray[np.int64]:
    """UTF-8 byte offset of each character position, int64 [len(text) + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


def _pack(
    tokens: NDArray[np.int32],
    sizes: NDArray[np.int64],
    owners: NDArray[np.int32],
    *,
    code: int,
    block_length: int,
) -> dict[str, Any]:
    starts = np.arange(0, len(tokens) - 1, block_length - 1, dtype=np.int64)
    ends = np.minimum(starts + block_length, len(tokens))
    byte_sums = np.concatenate([[0], np.cumsum(sizes)])
    cluster = [_most_frequent(owners[s + 1 : e]) for s, e in zip(starts, ends, strict=True)]
    return {
        "tokens": tokens,
        "starts": starts,
        "lengths": (ends - starts).astype(np.int32),
        "domain": np.full(len(starts), code, dtype=np.int32),
        "document": np.asarray(cluster, dtype=np.int32),
        "bytes": byte_sums[ends] - byte_sums[starts + 1],
    }


def _most_frequent(owners: NDArray[np.int32]) -> int:
    """Of ascending numbers; the first of equals."""
    return int(owners[0] + np.bincount(owners - owners[0]).argmax())


def save(blocks: Blocks, folder: Path) -> None:
    """Write blocks to ``folder``, which appears whole or not at all."""
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    for name in _ARRAYS:
        np.save(temporary / f"{name}.npy", getattr(blocks, name))
    about = {"digest": blocks.digest, "domains": blocks.domains}
    (temporary / "blocks.json").write_text(json.dumps(about))
    try:
        temporary.rename(folder)
    except OSError:  # another process made the same blocks first
        shutil.rmtree(temporary)
        if not (folder / "blocks.json").is_file():
            raise


def load(folder: str | os.PathLike[str]) -> Blocks:
    """Memory-map blocks that ``save`` wrote."""
    about = json.loads(Path(folder, "blocks.json").read_text())
    arrays = {name: np.load(Path(folder, f"{name}.npy"), mmap_mode="r") for name in _ARRAYS}
    return Blocks(about["digest"], tuple(about["domains"]), **arrays)
