"""Tokenizers of checkpoints: their identity, and text as tokens with the bytes of each."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptfuse.checkpoints import is_code, is_tokenizer, read_ancillary
from ckptfuse.corpus.documents import beginning_of
from ckptfuse.digests import content_digest, digest
from ckptfuse.errors import CorpusError
from ckptfuse.own_code import offered, reason_of, tokenizer_class
from ckptfuse.store import Store

#: Of the beginning that is tried first: twice what most tokenizers need.
_CHARACTERS_PER_TOKEN = 8
#: The last pieces of a beginning, that may be others where the text goes on.
_UNCERTAIN_PIECES = 8


class Encoded(NamedTuple):
    """Token ids; where each begins and ends in the text, and which piece of the text it is from.

    Pieces are what a tokenizer splits text into, a word or so, before it makes tokens of each by
    itself. Slow tokenizers tell neither.
    """

    ids: list[int]
    offsets: list[tuple[int, int]] | None
    pieces: list[int] | None


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A Hugging Face tokenizer and the digest of its files."""

    encode: Callable[[str], Encoded]
    separator: int | None  # the token between documents
    digest: str


def tokenizer_files_digest(store: Store) -> str | None:
    """Digest of the tokenizer files in a folder; None when there are none. Small reads only.

    Python beside them is one of them where the tokenizer is a class of its own.
    """
    return _digest_of(read_ancillary(store))


def _digest_of(files: dict[str, bytes]) -> str | None:
    has_code = tokenizer_class(files) is not None
    contents = [
        [path, len(data), content_digest(data)]
        for path, data in files.items()
        if is_tokenizer(path) or (has_code and is_code(path))
    ]
    return digest(contents) if contents else None


def load_tokenizer(store: Store, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer that lies in a folder or S3 prefix; raises CorpusError when there is none.

    ``trust_remote_code``: Python that lies beside it is run where its configuration asks for it.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    files = read_ancillary(store)
    digest_ = _digest_of(files)
    if digest_ is None:
        raise CorpusError(
            f"{store.uri}: no tokenizer; set corpus.tokenizer in params.yaml (or --tokenizer) "
            "to a folder that has them"
        )
    transformers_logging.set_verbosity_error()  # "sequence longer than ...": we cut it ourselves
    with offered(files) as folder:
        try:
            # Said, not left out: transformers would ask on the terminal.
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            reason = reason_of(error, folder, store.uri)
            raise CorpusError(f"{store.uri}: the tokenizer cannot be loaded: {reason}") from error
    separator = tokenizer.bos_token_id
    if separator is None:
        separator = tokenizer.eos_token_id

    def encode(text: str) -> Encoded:
        fast = bool(tokenizer.is_fast)
        answer = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
        if not fast:
            return Encoded(answer["input_ids"], None, None)
        return Encoded(answer["input_ids"], answer["offset_mapping"], answer.word_ids())

    return Tokenizer(encode, separator, digest_)


def encode(
    text: str, tokenizer: Tokenizer, most: int | None = None
) -> tuple[list[int], NDArray[np.int64]]:
    """Token ids and the bytes of text that each stands for; the first ``most`` of them.

    All tokens' bytes sum to the text's. A token's reach from the furthest end before it to its own
    end, so that pieces of one character do not count it twice and skipped white space counts with
    the token after it.
    """
    first = None if most is None else _first(text, tokenizer, most)
    if first is None:
        first = _with_sizes(text, tokenizer.encode(text))
    ids, sizes = first
    return ids[:most], sizes[:most]


def _first(
    text: str, tokenizer: Tokenizer, most: int
) -> tuple[list[int], NDArray[np.int64]] | None:
    """At least ``most`` of the text's tokens, from a beginning of it; None: the whole is needed.

    What comes before the last pieces of a beginning does not depend on how the text goes on. Where
    a tokenizer does not tell pieces, or takes the text as one, all of it might.
    """
    length = _CHARACTERS_PER_TOKEN * most
    while len(part := beginning_of(text, length)) < len(text):
        encoded = tokenizer.encode(part)
        if not encoded.pieces or encoded.pieces[-1] == 0:
            return None
        certain = bisect_right(encoded.pieces, encoded.pieces[-1] - _UNCERTAIN_PIECES)
        if certain >= most:
            return _with_sizes(part, encoded)
        length *= 2
    return None


def _with_sizes(text: str, encoded: Encoded) -> tuple[list[int], NDArray[np.int64]]:
    ids, offsets, _ = encoded
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
