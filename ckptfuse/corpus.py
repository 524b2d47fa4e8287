"""The target text: documents in named domains, split once and for all by their content.

Each document goes to ``selection``, ``audit`` or ``report`` by a salted hash of its text, so it
never changes sides when others are added, and a copy of it in another file is the same document.
A budget of tokens per domain and split is drawn in the order of a seeded hash: a fixed random
sample that grows without being reshuffled.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ckptfuse.digests import digest
from ckptfuse.errors import CorpusError, MissingFile, StoreError
from ckptfuse.params import CorpusParams, Shares
from ckptfuse.store import read_uri

Split = Literal["selection", "audit", "report"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    digest: str  # SHA-256 (hex) of the UTF-8 text


@dataclass(frozen=True, slots=True)
class Corpus:
    """Domain name -> documents in the order of the draw; domains by name, whatever params' order.

    ``digest`` names all that decides it.
    """

    domains: Mapping[str, tuple[Document, ...]]
    digest: str


def read_documents(uri: str) -> list[Document]:
    """The documents of a JSONL file (local or S3) whose lines have a ``text`` field.

    Empty texts are left out. Raises CorpusError naming the line that cannot be used.
    """
    try:
        # Not splitlines(): U+2028 and its like may stand inside a JSON string.
        lines = read_uri(uri).decode("utf-8-sig").split("\n")
    except MissingFile as error:
        raise CorpusError(
            f"{uri}: no such corpus file; correct corpus.domains or --corpus"
        ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{uri}: not UTF-8 text: {error}") from error
    documents = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            text = _text(uri, number, line)
            if text:
                documents.append(Document(text, hashlib.sha256(text.encode()).hexdigest()))
    return documents


def _text(uri: str, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # a lone surrogate is no text
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f'{uri}, line {number}: expected a JSON object with a string "text": {error!r}'
        ) from error
    return str(text)


def read_corpus(params: CorpusParams) -> Corpus:
    """All domains of ``params``, without duplicates, each in the order of the seeded draw.

    Raises CorpusError when there is no domain, or one without text.
    """
    if not params.domains:
        raise CorpusError(
            "no target text: give corpus.domains in params.yaml at least one domain, like "
            "`python: {path: corpus/python.jsonl}`"
        )
    seen: set[str] = set()
    domains = {}
    for name, domain in sorted(params.domains.items()):
        try:
            fresh = _unique(read_documents(domain.path), seen)
        except StoreError as error:
            raise CorpusError(f"corpus domain {name!r}: {error}") from error
        if not fresh:
            raise CorpusError(f"{domain.path}: domain {name!r} has no documents of its own")
        domains[name] = tuple(sorted(fresh, key=lambda document: _draw_key(params.seed, document)))
    return Corpus(domains, _corpus_digest(params, domains))


def _unique(documents: Iterable[Document], seen: set[str]) -> list[Document]:
    unique = []
    for document in documents:
        if document.digest not in seen:
            seen.add(document.digest)
            unique.append(document)
    return unique


def _draw_key(seed: int, document: Document) -> str:
    return hashlib.sha256(f"draw:{seed}:{document.digest}".encode()).hexdigest()


def _corpus_digest(params: CorpusParams, domains: Mapping[str, tuple[Document, ...]]) -> str:
    decides = params.model_dump(mode="json", exclude={"domains", "tokenizer"})
    contents = {name: [document.digest for document in docs] for name, docs in domains.items()}
    return digest([decides, contents])


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
