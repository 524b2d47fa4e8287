"""Real text that every machine has, in named domains: what the demo trains on and scores on.

    python      source files of the standard library; the training distribution
    prose       the language reference, which Python carries for `help()`
    c           headers of Python, else of an installed package
    javascript  readable scripts inside installed packages

The files of the training distribution, in the order of a salted hash of their content, are divided
into `train`, the first 72 % of the bytes, and the corpus domain `python`: no held-out file was ever
trained on, and the same Python release gives the same division everywhere. The other domains are
out of distribution: nothing of them is trained on, and one that a machine has too little of is left
out, because a loss over a few files has a standard error larger than the differences we look for.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TRAIN_SHARE = 0.72  # of the bytes
SMALLEST_DOCUMENT = 1_000  # bytes; package markers and re-export stubs are no text to learn from
LARGEST_DOCUMENT = 256_000  # bytes; larger ones are generated tables that would drown a domain
SMALLEST_DOMAIN = 250_000  # bytes, some 60k tokens or more
LARGEST_DOMAIN = 1_500_000  # bytes; keeps one score of the whole corpus to seconds
LONGEST_MEAN_LINE = 120  # characters; minified scripts have lines of thousands

_SALT = b"ckptfuse demo split 1"

# Some distributions ship these apart from Python or not at all, and some releases dropped them:
# without them the text is much alike on every machine. Two are left out for what they hold:
# `encodings` is character tables, and `pydoc_data` is the prose domain itself.
_NOT_TRAINING_TEXT = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "distutils",
        "ensurepip",
        "tkinter",
        "turtledemo",
        "encodings",
        "pydoc_data",
    }
)


@dataclass(frozen=True, slots=True)
class Texts:
    """The demo's documents: none is in two places, each list in an order set by content alone."""

    train: list[str]  # the training part of the standard library
    domains: dict[str, list[str]]  # the corpus by domain; "python" is the library's held-out part


def gather() -> Texts:
    """Collect the text of this machine.

    Raises:
        RuntimeError: the standard library's sources are not there to be read.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = _in_hash_order(_read(_standard_library(stdlib)))
    train = _first(sources, size=int(TRAIN_SHARE * _size(sources)))
    domains = {"python": sources[len(train) :]}
    for part, documents in (("training", train), ("held-out", domains["python"])):
        if _size(documents) < SMALLEST_DOMAIN:
            raise RuntimeError(
                f"{stdlib}: only {_size(documents)} bytes of {part} text in the standard library's "
                f"sources, the demo needs {SMALLEST_DOMAIN}; use a Python that was installed with "
                "its .py files"
            )
    seen = set(sources)
    for name, documents in (
        ("prose", _language_reference()),
        ("c", _headers()),
        ("javascript", _scripts()),
    ):
        unseen = [text for text in _in_hash_order(documents) if text not in seen]
        domain = _first(unseen, size=LARGEST_DOMAIN)
        if _size(domain) >= SMALLEST_DOMAIN:
            domains[name] = domain
            seen.update(domain)
    return Texts(train=train, domains=domains)


def write_jsonl(path: Path, documents: Iterable[str]) -> None:
    """Write one JSON object `{"text": ...}` a line, UTF-8, the folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _standard_library(root: Path) -> Iterator[Path]:
    """Python files of the library; build configuration (`_sysconfigdata*`) differs by machine."""
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        if _NOT_TRAINING_TEXT.isdisjoint(folders) and not path.name.startswith("_sysconfigdata"):
            yield path


def _language_reference() -> list[str]:
    """Each topic of `help()` that is more than a pointer to another: reStructuredText prose."""
    from pydoc_data.topics import topics

    return [text for text in topics.values() if len(text) >= SMALLEST_DOCUMENT]


def _headers() -> list[str]:
    """C headers from the first place that has enough: Python's own need a development package."""
    packages = Path(sysconfig.get_path("platlib"))
    for root in (
        Path(sysconfig.get_path("include")),
        packages / "numpy" / "_core" / "include",
        packages / "torch" / "include",
    ):
        documents = list(_read(root.rglob("*.h")))
        if _size(documents) >= SMALLEST_DOMAIN:
            return documents
    return []


def _scripts() -> list[str]:
    """JavaScript that a person wrote to be read, from all installed packages."""
    documents = _read(Path(sysconfig.get_path("purelib")).rglob("*.js"))
    return [text for text in documents if len(text) < LONGEST_MEAN_LINE * (text.count("\n") + 1)]


def _read(paths: Iterable[Path]) -> Iterator[str]:
    """The files that are UTF-8 text of a sensible size; the others are passed over."""
    for path in paths:
        try:
            if SMALLEST_DOCUMENT <= path.stat().st_size <= LARGEST_DOCUMENT:
                yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def _digest(text: str) -> bytes:
    return hashlib.sha256(_SALT + text.encode()).digest()


def _in_hash_order(documents: Iterable[str]) -> list[str]:
    """Each distinct document once, in an order that depends on neither paths nor file systems."""
    return sorted(set(documents), key=_digest)


def _first(documents: list[str], *, size: int) -> list[str]:
    """The longest beginning of the list that stays within so many bytes."""
    for count, text in enumerate(documents):
        size -= len(text.encode())
        if size < 0:
            return documents[:count]
    return documents


def _size(documents: Iterable[str]) -> int:
    """Bytes of UTF-8."""
    return sum(len(text.encode()) for text in documents)
