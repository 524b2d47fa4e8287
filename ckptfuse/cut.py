"""How a stream of documents' tokens is cut into the blocks that a model scores.

``packed``: documents follow one another, each preceded by the tokenizer's begin-of-sequence token
(or its end-of-sequence token when it has no other; none, with a warning, when it has neither), and
the stream of a domain is cut::

    stream    B d d d d B d d B d d d d d d
    block 0   |---------|
    block 1           |---------|            the last token of one is the first of the next,
    block 2                   |-----|        so every token but the stream's first is predicted once

With a ``stride`` S < L - 1 each block after the first predicts S tokens and reads the L - S before
them as context (https://huggingface.co/docs/transformers/perplexity): slower, and a lower loss.

``rolling``: each document by itself, all of its tokens predicted, the first from the
begin-of-sequence token; the last block of a document reaches back to be as long as the others.
This is lm-evaluation-harness's ``loglikelihood_rolling`` with ``max_length`` L.
"""

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptfuse.errors import ConfigurationError


class Span(NamedTuple):
    """A block: ``stream[start:end]``, whose first ``context`` tokens are only read."""

    start: int
    end: int
    context: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a stream of tokens becomes blocks, and what stands before each document."""

    length: int
    layout: Literal["packed", "rolling"] = "packed"
    stride: int | None = None
    bos: Literal["document", "none"] = "document"

    def __post_init__(self) -> None:
        if self.stride is not None and not 0 < self.stride < self.length:
            raise ConfigurationError(
                f"scoring.stride is {self.stride}: 1 to {self.length - 1} are accepted with blocks "
                f"of {self.length} tokens"
            )
        if self.layout == "rolling" and (self.stride is not None or self.bos == "none"):
            raise ConfigurationError(
                "scoring.layout 'rolling' predicts each document from its begin-of-sequence token, "
                "without overlap: it goes with bos 'document' and without a stride"
            )

    def spans(self, owners: NDArray[np.int32]) -> list[Span]:
        """The blocks of a stream, given the index of each token's document, int32 [T]."""
        if self.layout == "rolling":
            return _rolling(owners, self)
        return _packed(len(owners), self)


def _packed(count: int, cut: Cut) -> list[Span]:
    stride = cut.stride or cut.length - 1
    spans = []
    start, predicted = 0, 1  # predicted: the first token that no block has predicted
    while predicted < count:
        end = min(start + cut.length, count)
        spans.append(Span(start, end, predicted - start))
        start, predicted = start + stride, end
    return spans


def _rolling(owners: NDArray[np.int32], cut: Cut) -> list[Span]:
    spans = []
    borders = np.flatnonzero(np.diff(owners, prepend=-1, append=-1)).tolist()
    for first, last in itertools.pairwise(borders):
        for predicted in range(first + 1, last, cut.length):
            end = min(predicted + cut.length, last)
            start = max(end - 1 - cut.length, first)
            spans.append(Span(start, end, predicted - start))
    return spans
