"""Models and tokenizers that are Python files beside their configuration (its ``auto_map``).

transformers reads them from a folder, and runs them only where the caller trusts them.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ckptfuse.checkpoints import CONFIG, TOKENIZER_CONFIG, is_code
from ckptfuse.digests import content_digest, digest
from ckptfuse.store import Store


def read_code(store: Store) -> dict[str, bytes]:
    """The Python files of the model in this folder: path -> content."""
    return {e.path: store.read(e.path) for e in store.list("") if is_code(e.path)}


def tokenizer_class(files: Mapping[str, bytes]) -> str | None:
    """The class of a tokenizer that is Python beside it, as ``module.Class``; None for the others.

    ``files``: path -> content, of the folder in which it lies.
    """
    for path in (TOKENIZER_CONFIG, CONFIG):
        try:
            named = json.loads(files.get(path, b"{}"))["auto_map"]
        except (ValueError, LookupError, TypeError):  # damaged, which transformers tells; or none
            continue
        if isinstance(named, Mapping):
            named = named.get("AutoTokenizer", ())
        # One name, or a pair: the slow one and the fast one, of which either may be null.
        classes = [named] if isinstance(named, str) else [name for name in named or () if name]
        if classes:
            return str(classes[0])
    return None


@contextmanager
def offered(files: Mapping[str, bytes]) -> Iterator[str]:
    """A folder with these files, for transformers to read.

    transformers keeps a copy of code by the folder's name, for good: the same code has the same.
    """
    code = sorted([path, content_digest(data)] for path, data in files.items() if is_code(path))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, f"model_{digest(code)[:16]}")
        folder.mkdir()
        for path, data in files.items():
            (folder / path).write_bytes(data)
        yield str(folder)


def reason_of(error: Exception, folder: str, where: str) -> str:
    """What transformers says, of the place that the files are from; and how code is trusted."""
    if "trust_remote_code" in str(error):
        return (
            "its configuration asks for code that lies beside it (auto_map), which is run only "
            "where scoring.trust_remote_code (--trust-remote-code) allows it"
        )
    return str(error).replace(folder, where)
