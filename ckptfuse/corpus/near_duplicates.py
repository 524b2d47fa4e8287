"""Documents that are nearly alike: copies with another header, a new date, a paragraph more.

Two documents are near-duplicates when the sets of their shingles, of five words in a row each,
overlap by ``THRESHOLD`` or more (Jaccard: common shingles by all of them). MinHash with
locality-sensitive hashing (Broder 1997; datasketch) finds the pairs to look at, their sets decide:
so what is found is true, and of pairs that overlap by 0.7 one in 12 is missed, by 0.8 one in 500.
Of a document that is kept in part, that part is compared.

The work grows with the documents and not with their pairs, also where all are filled-in forms of
one template: of documents that have a band of their sketches in common, at most ``_BUCKET`` of a
split are looked at. More have one in common only if they share a template, and the pairs among them
that are closer than that share other bands too.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptfuse.corpus.documents import Document
from ckptfuse.corpus.draw import SPLITS, Split

THRESHOLD = 0.7
_SHINGLE = 5  # words
_PERMUTATIONS = 128
#: Pairs with six equal values in one of twenty bands are looked at: 1 - (1 - 0.7^6)^20 = 92 %.
_BANDS, _ROWS = 20, 6
#: Documents of a split.
_BUCKET = 16
#: A character of scripts without spaces is a word, as are the letters and digits of others.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
#: Odd, so that no bit of a word's number is lost when words are combined modulo 2^64.
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Placed:
    """A document and where it was put."""

    domain: str
    split: Split
    document: Document


@dataclass(frozen=True, slots=True)
class Twins:
    """Two near-duplicates in different splits; ``similarity`` is their Jaccard index."""

    one: Placed
    other: Placed
    similarity: float


def twins_across_splits(placed: Sequence[Placed]) -> list[Twins]:
    """For each document and each other split the first near-duplicate found there, if any.

    In the order of ``placed``; a pair is told from both of its sides.
    """
    sets = _Shingles().of_all([item.document.text for item in placed])
    found = []
    for number, candidates in enumerate(_candidates(placed, sets)):
        others = set(SPLITS) - {placed[number].split}
        for candidate in candidates:
            split = placed[candidate].split
            if split not in others:
                continue
            similarity = _jaccard(sets[number], sets[candidate])
            if similarity >= THRESHOLD:
                others.remove(split)
                found.append(Twins(placed[number], placed[candidate], similarity))
    return found


def _candidates(
    placed: Sequence[Placed], sets: Sequence[NDArray[np.uint64]]
) -> Iterator[list[int]]:
    """For each document those to compare it with, in their order: they share a band of sketches."""
    # Without a word a document would be like all others without one.
    bands = [_bands(sketch) if len(sets[n]) else [] for n, sketch in enumerate(_sketches(sets))]
    buckets: dict[tuple[int, bytes], dict[Split, list[int]]] = {}
    for number, item in enumerate(placed):
        for band in bands[number]:
            bucket = buckets.setdefault(band, {}).setdefault(item.split, [])
            if len(bucket) < _BUCKET:
                bucket.append(number)
    for mine in bands:
        yield sorted({n for band in mine for bucket in buckets[band].values() for n in bucket})


def _bands(sketch: Any) -> list[tuple[int, bytes]]:
    values = sketch.hashvalues
    return [(n, values[n * _ROWS : (n + 1) * _ROWS].tobytes()) for n in range(_BANDS)]


class _Shingles:
    """Texts to sets of shingles, as sorted uint64 arrays; words are numbered as they come."""

    def __init__(self) -> None:
        self._words: dict[str, int] = {}

    def of_all(self, texts: Sequence[str]) -> list[NDArray[np.uint64]]:
        return [self._of(text) for text in texts]

    def _of(self, text: str) -> NDArray[np.uint64]:
        """A number for each distinct shingle; a shorter text is one, a text without words none."""
        words = self._words
        numbers = [words.setdefault(w, len(words) + 1) for w in _WORD.findall(text.lower())]
        mixed = np.asarray(numbers, dtype=np.uint64)
        length = min(_SHINGLE, len(numbers))
        count = len(numbers) - length + 1 if length else 0
        shingles = np.zeros(count, dtype=np.uint64)
        for offset in range(length):
            shingles = shingles * _BASE + mixed[offset : offset + count]
        shingles ^= shingles >> np.uint64(32)
        return np.unique(shingles)


def _sketches(sets: Sequence[NDArray[np.uint64]]) -> Iterator[Any]:
    from datasketch import MinHash

    low = ((shingles & np.uint64(0xFFFFFFFF)).tolist() for shingles in sets)
    yield from MinHash.generator(low, num_perm=_PERMUTATIONS, seed=1, hashfunc=int)


def _jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - common
    return common / union if union else 0.0
