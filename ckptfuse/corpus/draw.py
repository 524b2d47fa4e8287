"""The documents of a corpus: drawn from all that its files hold, split once and for all.

Each document goes to ``selection``, ``audit`` or ``report`` by a salted hash of its text, so it
never changes sides when others are added, and a copy of it in another file is the same document.
In each domain and split the documents have an order, that of a seeded hash, and the first of them
are the corpus: as many as the budget can use, whatever the tokenizer::

    counted(document) = min(max(bytes, 32), 32 x tokens_per_document)
    drawn             = the fewest first documents with  sum counted >= 32 x budget in tokens

since no tokenizer that we know makes one token of 32 bytes of text on average, and no document is
less than a token. (With one that does, fewer tokens than the budget are scored.) So a fixed random
sample grows without being reshuffled, memory holds what is drawn and not the files, and what is
drawn, drawn from again, is the same corpus: that is what the ledger keeps. Of a long document a
beginning is kept, of twice as many characters as are counted.
"""

import hashlib
import heapq
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ckptfuse.corpus.documents import Document
from ckptfuse.corpus.files import find_files
from ckptfuse.corpus.texts import read_documents
from ckptfuse.digests import digest
from ckptfuse.errors import CorpusError
from ckptfuse.params import Budget, CorpusParams, Shares

Split = Literal["selection", "audit", "report"]
SPLITS: tuple[Split, ...] = get_args(Split)

#: Told of bytes that came, and of all that there are.
Progress = Callable[[int, int], None]

BYTES_PER_TOKEN = 32
#: Of the longest beginning that is kept. Twice the bytes that count: there are tokens to spare.
CHARACTERS_PER_TOKEN = 2 * BYTES_PER_TOKEN
#: Names how documents are drawn.
DRAW = f"draw-1:{BYTES_PER_TOKEN}"


@dataclass(frozen=True, slots=True)
class Source:
    """What the files of a domain hold, drawn or not.

    ``documents`` counts all that are not empty, ``distinct`` those that differ (by 64 bits of
    their hashes), ``bytes`` their UTF-8; ``digest`` names the set of distinct ones.
    """

    uri: str
    files: int
    documents: int
    distinct: int
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Domain name -> what was drawn, in the order of the draw; domains by name.

    ``digest`` names all that decides it, ``sources`` tells what it was drawn from.
    """

    domains: Mapping[str, tuple[Document, ...]]
    digest: str
    sources: Mapping[str, Source]


def read_corpus(
    params: CorpusParams,
    *,
    whole: bool = False,
    read: Progress = lambda size, of: None,
) -> Corpus:
    """All domains of ``params``: what the budgets can use, or the ``whole`` text of the files.

    A document that was drawn for a domain is not drawn again for one further down the alphabet.
    ``read`` is told of bytes that came, and of how many the files have. Raises CorpusError when
    there is no domain, one without text, or a file that cannot be used.
    """
    if not params.domains:
        raise CorpusError(
            "no target text: give corpus.domains in params.yaml at least one domain, like "
            "`python: {path: corpus/python.jsonl}`"
        )
    files = {name: find_files(domain.path) for name, domain in params.domains.items()}
    total = sum(file.entry.size for found in files.values() for file in found)
    taken: set[str] = set()
    domains, sources = {}, {}
    for name, domain in sorted(params.domains.items()):
        draw = _Draw(params, None if whole else params.budget(name), taken)
        for file in files[name]:
            for document in read_documents(file, domain.field, read=lambda size: read(size, total)):
                draw.offer(document)
        domains[name] = draw.documents()
        if not domains[name]:
            raise CorpusError(f"{domain.path}: domain {name!r} has no documents of its own")
        taken |= {document.digest for document in domains[name]}
        sources[name] = draw.source(domain.path, len(files[name]))
    return Corpus(domains, _corpus_digest(params, domains, whole), sources)


class _Draw:
    """One domain's draw, document by document; memory holds what is drawn so far."""

    def __init__(self, params: CorpusParams, budget: Budget | None, taken: set[str]) -> None:
        self._params = params
        self._taken = taken
        self._is_whole = budget is None
        self._first = {
            split: _First(
                BYTES_PER_TOKEN * getattr(budget, split) if budget is not None else math.inf
            )
            for split in SPLITS
        }
        self._hashes = array("Q")
        self._bytes = 0

    def offer(self, document: Document) -> None:
        if self._is_whole and not document.is_whole:
            document = Document.of(document.text)  # what the file has of it is all that is wanted
        self._hashes.append(int(document.digest[:16], 16))
        self._bytes += document.size
        if document.digest in self._taken:
            return
        split = split_of(document, salt=self._params.salt, shares=self._params.shares)
        self._first[split].offer(
            _place(self._params.seed, document), self._counted(document), self._kept(document)
        )

    def _counted(self, document: Document) -> int:
        most = BYTES_PER_TOKEN * self._params.tokens_per_document
        return min(max(document.size, BYTES_PER_TOKEN), most)

    def _kept(self, document: Document) -> Document:
        if self._is_whole:
            return document
        return document.beginning(CHARACTERS_PER_TOKEN * self._params.tokens_per_document)

    def documents(self) -> tuple[Document, ...]:
        """What is drawn, of all splits together, in the order of the draw."""
        ordered = sorted(item for first in self._first.values() for item in first.items())
        return tuple(document for _, document in ordered)

    def source(self, uri: str, files: int) -> Source:
        distinct = np.unique(np.frombuffer(self._hashes, dtype=np.uint64))
        named = hashlib.sha256(distinct.astype(">u8").tobytes()).hexdigest()
        return Source(uri, files, len(self._hashes), len(distinct), self._bytes, named)


class _First:
    """The first documents by place with ``enough`` counted bytes; the others are let go."""

    def __init__(self, enough: float) -> None:
        self._enough = enough
        self._counted = 0
        self._heap: list[tuple[int, int, Document]] = []  # (-place, counted, document): last first
        self._places: set[int] = set()

    def offer(self, place: int, counted: int, document: Document) -> None:
        is_full = self._counted >= self._enough
        if (is_full and place > -self._heap[0][0]) or place in self._places:
            return
        heapq.heappush(self._heap, (-place, counted, document))
        self._places.add(place)
        self._counted += counted
        while self._counted - self._heap[0][1] >= self._enough:
            last, counted, _ = heapq.heappop(self._heap)
            self._places.remove(-last)
            self._counted -= counted

    def items(self) -> list[tuple[int, Document]]:
        return [(-negative, document) for negative, _, document in self._heap]


def _place(seed: int, document: Document) -> int:
    """Where a document stands in the order of the draw: 256 bits of a seeded hash."""
    return int.from_bytes(hashlib.sha256(f"draw:{seed}:{document.digest}".encode()).digest(), "big")


def _corpus_digest(
    params: CorpusParams, domains: Mapping[str, tuple[Document, ...]], whole: bool
) -> str:
    decides = params.model_dump(mode="json", exclude={"domains", "tokens", "tokenizer"})
    budgets = None if whole else {name: params.budget(name).model_dump() for name in domains}
    contents = {name: [document.digest for document in docs] for name, docs in domains.items()}
    return digest([DRAW, decides, budgets, contents])


def split_of(document: Document, *, salt: str, shares: Shares) -> Split:
    """The one split that a document belongs to, by a salted hash of its content."""
    hashed = hashlib.sha256(f"split:{salt}:{document.digest}".encode()).digest()
    position = int.from_bytes(hashed[:8], "big") / 2**64
    total = shares.selection + shares.audit + shares.report
    if position < shares.selection / total:
        return "selection"
    if position < (shares.selection + shares.audit) / total:
        return "audit"
    return "report"


def documents_of(
    corpus: Corpus, split: Split, params: CorpusParams
) -> dict[str, tuple[Document, ...]]:
    """Domain name -> the documents of one split, in the order of the draw."""
    return {
        name: tuple(
            document
            for document in documents
            if split_of(document, salt=params.salt, shares=params.shares) == split
        )
        for name, documents in corpus.domains.items()
    }


def documents_to_score(
    corpus: Corpus, split: Split, params: CorpusParams
) -> dict[str, tuple[Document, ...]]:
    """The same where each domain has some; raises CorpusError naming one that has none."""
    domains = documents_of(corpus, split, params)
    for name, documents in domains.items():
        if not documents:
            source = corpus.sources[name]
            raise CorpusError(
                f"{source.uri}: domain {name!r} has no document in {split}. It has "
                f"{source.distinct} in all, and each is in one split only, by the hash of its "
                "text. A .txt or .md file is one document, a line of JSON lines is one: give the "
                "text as more documents, some dozens at least"
            )
    return domains
