"""A document: named by the digest of all its text, kept as far as its text can be used.

Of a book only the first ``tokens_per_document`` tokens are scored, so that much of it is kept, and
more for good measure. A file of documents carries the name of a text that it holds in part::

    {"text": "It was the best of", "ckptfuse_beginning_of": {"sha256": "9f...", "bytes": 776701}}
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

_BEGINNING_OF = "ckptfuse_beginning_of"
#: Where a word ends.
_END_OF_WORD = re.compile(r"(?<=\S)[ \n]")


@dataclass(frozen=True, slots=True)
class Document:
    """``text`` is the whole text, or a beginning of it, whose whole has ``whole_size`` bytes."""

    text: str
    digest: str  # SHA-256 (hex) of the whole UTF-8 text
    whole_size: int | None = None

    @classmethod
    def of(cls, text: str) -> "Document":
        return cls(text, hashlib.sha256(text.encode()).hexdigest())

    @property
    def is_whole(self) -> bool:
        return self.whole_size is None

    @property
    def size(self) -> int:
        """Bytes of the whole text in UTF-8."""
        return len(self.text.encode()) if self.whole_size is None else self.whole_size

    def beginning(self, length: int) -> "Document":
        """The same document, with a text of about ``length`` characters if it has more."""
        text = beginning_of(self.text, length)
        return self if text is self.text else replace(self, text=text, whole_size=self.size)


def beginning_of(text: str, length: int) -> str:
    """``text`` up to the first end of a word after ``length`` characters; all where none follows.

    A tokenizer makes of the words before a white space, but for the last few, what it makes of them
    in the whole text. A cut inside a word, or a number, can change all of its tokens.
    """
    end = _END_OF_WORD.search(text, length)
    return text if end is None else text[: end.start()]


def jsonl(documents: Iterable[Document]) -> bytes:
    """Documents as a file that reads back as the same ones: a JSON object with ``text`` a line."""
    lines = (json.dumps(_line(document), ensure_ascii=False) for document in documents)
    return "".join(f"{line}\n" for line in lines).encode()


def _line(document: Document) -> dict[str, Any]:
    if document.is_whole:
        return {"text": document.text}
    whole = {"sha256": document.digest, "bytes": document.whole_size}
    return {"text": document.text, _BEGINNING_OF: whole}


def of_line(line: Mapping[str, Any], field: str) -> Document | None:
    """The document of a line's JSON object, None for null.

    Raises KeyError, TypeError, AttributeError or UnicodeEncodeError where there is no text.
    """
    text = line[field]
    if text is None:
        return None
    whole = line.get(_BEGINNING_OF)
    return Document.of(text) if whole is None else Document(text, whole["sha256"], whole["bytes"])
