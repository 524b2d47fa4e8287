"""Documents that are nearly alike: copies with another header, a new date, a paragraph more.

Two documents are near-duplicates when the sets of their shingles, of five words in a row each,
overlap by ``THRESHOLD`` or more (Jaccard: common shingles by all of them). MinHash with
locality-sensitive hashing (Broder 1997; datasketch) finds the pairs to look at, their sets decide:
so what is found is true, and of pairs that overlap by 0.7 one in 12 is missed, by 0.8 one in 500.
Of a document that is kept in part, that part is compared.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptfuse.corpus.documents import Document
from ckptfuse.corpus.draw import Split

THRESHOLD = 0.7
_SHINGLE = 5  # words
_PERMUTATIONS = 128
#: Of pairs looked at in vain, and of pairs missed: the first cost little.
_WEIGHTS = (0.1, 0.9)
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
    from datasketch import MinHashLSH

    sets = _Shingles().of_all([item.document.text for item in placed])
    sketches = list(_sketches(sets))
    index = MinHashLSH(threshold=THRESHOLD, num_perm=_PERMUTATIONS, weights=_WEIGHTS)
    with index.insertion_session() as session:
        for number, sketch in enumerate(sketches):
            if len(sets[number]):  # without a word it would be like all others without one
                session.insert(number, sketch)
    found = []
    for number, sketch in enumerate(sketches):
        done = {placed[number].split}
        for candidate in sorted(index.query(sketch)):
            split = placed[candidate].split
            if split in done:
                continue
            similarity = _jaccard(sets[number], sets[candidate])
            if similarity >= THRESHOLD:
                done.add(split)
                found.append(Twins(placed[number], placed[candidate], similarity))
    return found


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
