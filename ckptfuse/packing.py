"""The documents of one split as token blocks: tokenised once and cut into contexts (cut.py)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptfuse.blocks import Blocks
from ckptfuse.corpus import Document
from ckptfuse.cut import Cut, Span
from ckptfuse.errors import CorpusError
from ckptfuse.tokenizing import Tokenizer, encode


def build(
    documents: Mapping[str, Sequence[Document]],
    tokenizer: Tokenizer,
    *,
    digest: str,
    cut: Cut,
    tokens: Mapping[str, int] | None = None,
    tokens_per_document: int | None = None,
) -> Blocks:
    """Tokenise and cut each domain's documents, up to its ``tokens`` if there are such.

    Raises CorpusError naming a domain that yields nothing to predict, and for the rolling layout
    with a tokenizer that has no begin-of-sequence token. The packed layout goes without, with a
    warning.
    """
    separator = tokenizer.separator if cut.bos == "document" else None
    if cut.layout == "rolling" and separator is None:
        raise CorpusError(
            "scoring.layout 'rolling' needs a begin- or end-of-sequence token, and the tokenizer "
            "has neither; use layout 'packed'"
        )
    if cut.bos == "document" and separator is None:
        _warn_once(tokenizer.digest)
    parts = []
    for code, (name, texts) in enumerate(documents.items()):
        budget = tokens[name] if tokens is not None else None
        stream = _stream(texts, tokenizer, separator, budget, tokens_per_document)
        spans = cut.spans(stream.owners)
        if not spans:
            raise CorpusError(
                f"domain {name!r} has {len(texts)} documents to score, and in them no token to "
                "predict; give it more text"
            )
        parts.append(_blocks(stream, spans, code))
    offsets = np.cumsum([0] + [len(part["tokens"]) for part in parts[:-1]])
    documents_before = np.cumsum([0] + [int(part["document"].max()) + 1 for part in parts[:-1]])
    for part, offset, before in zip(parts, offsets, documents_before, strict=True):
        part["starts"] += offset
        part["document"] += before
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Blocks(digest, tuple(documents), **arrays)


@cache
def _warn_once(tokenizer: str) -> None:
    """Nothing is refused: scores of such tokenizers go on meaning what they have meant."""
    logging.getLogger("ckptfuse").warning(
        "the tokenizer (digest %s) has neither a begin- nor an end-of-sequence token: documents "
        "follow one another without, as with scoring.bos: none; where the model was trained with "
        "one, set corpus.tokenizer to a folder whose tokenizer_config.json names it",
        tokenizer[:12],
    )


@dataclass(frozen=True, slots=True)
class _Stream:
    """One domain's tokens, all arrays [T]: UTF-8 bytes and index of the document of each."""

    tokens: NDArray[np.int32]
    sizes: NDArray[np.int64]
    owners: NDArray[np.int32]


def _stream(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    separator: int | None,
    budget: int | None,
    per_document: int | None,
) -> _Stream:
    tokens, sizes = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    owners = [np.empty(0, np.int32)]
    total = 0
    for index, document in enumerate(documents):
        if budget is not None and total >= budget:
            break
        wanted = _least(per_document, None if budget is None else budget - total)
        ids, byte_counts = _encode(document, tokenizer, separator, wanted)
        tokens.append(np.asarray(ids, dtype=np.int32))
        sizes.append(byte_counts.astype(np.int64))
        owners.append(np.full(len(ids), index, dtype=np.int32))
        total += len(ids)
    return _Stream(np.concatenate(tokens), np.concatenate(sizes), np.concatenate(owners))


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _encode(
    document: Document, tokenizer: Tokenizer, separator: int | None, wanted: int | None
) -> tuple[list[int], NDArray[np.int64]]:
    """The first ``wanted`` tokens of a document, the separator included, and the bytes of each.

    Fewer of one that is kept in part and is no text of words (a hundred thousand blanks, say).
    """
    before = [] if separator is None else [separator]
    most = None if wanted is None else wanted - len(before)
    ids, byte_counts = encode(document.text, tokenizer, most)
    return [*before, *ids], np.concatenate([np.zeros(len(before), np.int64), byte_counts])


def _blocks(stream: _Stream, spans: Sequence[Span], code: int) -> dict[str, Any]:
    starts, ends, context = np.asarray(spans, dtype=np.int64).T
    byte_sums = np.concatenate([[0], np.cumsum(stream.sizes)])
    cluster = [_most_frequent(stream.owners[start + read : end]) for start, end, read in spans]
    return {
        "tokens": stream.tokens,
        "starts": starts,
        "lengths": (ends - starts).astype(np.int32),
        "context": context.astype(np.int32),
        "domain": np.full(len(starts), code, dtype=np.int32),
        "document": np.asarray(cluster, dtype=np.int32),
        "bytes": byte_sums[ends] - byte_sums[starts + context],
    }


def _most_frequent(owners: NDArray[np.int32]) -> int:
    """Of ascending numbers; the first of equals."""
    return int(owners[0] + np.bincount(owners - owners[0]).argmax())
