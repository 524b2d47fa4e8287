"""Token blocks: what models are scored on, as memory-mapped arrays in a folder.

A folder is named by the blocks' digest, and is written once (packing.py makes the blocks).
"""

import json
import os
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptfuse.cut import Cut
from ckptfuse.digests import digest
from ckptfuse.new_folder import new_folder

_ARRAYS = ("tokens", "starts", "lengths", "context", "domain", "document", "bytes")


@dataclass(frozen=True)
class Blocks:
    """Contexts to score, grouped by domain.

    ``tokens`` int32 [T] is the stream; block b is ``tokens[starts[b] : starts[b] + lengths[b]]``
    and predicts all of its tokens but the first ``context[b]`` (int32 [B], at least 1), which are
    only read. ``domain`` int32 [B] indexes ``domains``;
    ``document`` int32 [B] is the document that most of the block's predicted tokens come from:
    the cluster of standard errors; ``bytes`` int64 [B] counts the UTF-8 bytes of the predicted
    tokens.
    """

    digest: str
    domains: tuple[str, ...]
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    context: NDArray[np.int32]
    domain: NDArray[np.int32]
    document: NDArray[np.int32]
    bytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """Predicted tokens of each block, int64 [B]."""
        return (self.lengths - self.context).astype(np.int64)

    def block(self, index: int) -> NDArray[np.int32]:
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]


def block_digest(*, corpus: str, tokenizer: str, split: str, cut: Cut) -> str:
    """Names a set of blocks by all that decides it, before any text is tokenised."""
    return digest(["blocks-2", corpus, tokenizer, split, *astuple(cut)])


def save(blocks: Blocks, folder: Path) -> None:
    """Write blocks to ``folder``, which appears whole or not at all."""
    with new_folder(folder, last="blocks.json") as new:
        for name in _ARRAYS:
            np.save(new / f"{name}.npy", getattr(blocks, name))
        about = {"digest": blocks.digest, "domains": blocks.domains}
        (new / "blocks.json").write_text(json.dumps(about))


def load(folder: str | os.PathLike[str]) -> Blocks:
    """Memory-map blocks that ``save`` wrote."""
    about = json.loads(Path(folder, "blocks.json").read_text())
    arrays = {name: np.load(Path(folder, f"{name}.npy"), mmap_mode="r") for name in _ARRAYS}
    return Blocks(about["digest"], tuple(about["domains"]), **arrays)
