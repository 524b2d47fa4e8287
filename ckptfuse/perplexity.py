"""One model on token blocks: the summed negative log-likelihood of each block.

For a block of tokens t_0 .. t_n of which the first c are only read, the model predicts
t_c .. t_n from what stands before each::

    nll = - sum_{k=c..n} log softmax(logits_{k-1})[t_k]          nats
    loss = sum nll / sum (n + 1 - c),   perplexity = exp(loss)
    bits per byte = sum nll / (ln 2 * UTF-8 bytes of the predicted tokens)

over all blocks of a domain (https://huggingface.co/docs/transformers/perplexity; bits per byte as
in lm-evaluation-harness and arXiv 2101.00027, section 3.1). Logits are taken to float32 before the
log-softmax, whatever the model computes in, and summed in float64. Blocks of one length are
scored together, none is padded.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ckptfuse.blocks import Blocks
from ckptfuse.compiled import compiled_where_it_pays
from ckptfuse.errors import CkptfuseError
from ckptfuse.token_losses import TokenLosses

#: Tokens of one forward pass on a CPU: enough for the matrix products, few enough for the caches.
CPU_BATCH_TOKENS = 2_048
#: On a GPU: what fits into this part of the free memory, as measured on one block, at most so many.
GPU_SHARE = 0.7
GPU_BATCH_TOKENS = 65_536  # larger ones are no faster
#: Told of a model whose head cannot be run by parts.
WHOLE = (
    "this model's code makes the logits of a whole batch, which takes memory; "
    "scoring.batch_tokens sets how large a batch is"
)


@dataclass(frozen=True)
class BlockLosses:
    """Negative log-likelihood of each block in nats, float64 [B], in the order of the blocks.

    ``batch_tokens``: the tokens of one forward pass that it was found with at last. ``compiled``:
    whether full batches went through compiled layers.
    """

    nll: NDArray[np.float64]
    batch_tokens: int
    compiled: bool = False


def score_blocks(
    model: torch.nn.Module,
    blocks: Blocks,
    *,
    vocabulary: int,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    notice: Callable[[str], None] = lambda text: None,
) -> BlockLosses:
    """Score a causal language model with ``vocabulary`` embeddings, on the device where it lies.

    ``batch_tokens`` is found from the device when it is not given, and halved with a notice when
    the device runs out of memory. Raises CkptfuseError when a token is outside of the vocabulary,
    or when a single block does not fit.
    """
    check_vocabulary(blocks, vocabulary)
    losses = TokenLosses(model, vocabulary=vocabulary)
    if not losses.is_tiled:
        notice(WHOLE)
    size = batch_tokens or _fitting(losses, blocks)
    faster = compiled_where_it_pays(losses, model, *_commonest_batch(blocks, size), notice)
    score = faster or losses
    nll = np.empty(len(blocks), dtype=np.float64)
    done = 0
    for alike in groups(blocks):
        while len(alike):
            rows = alike[: _rows_of(blocks, alike, size)]
            try:
                nll[rows] = score(*_rows(blocks, rows)).numpy()
            except torch.OutOfMemoryError as error:
                size = _halved(rows, blocks, error)
            else:
                alike = alike[len(rows) :]
                done += len(rows)
                progress(done)
                continue
            torch.cuda.empty_cache()  # not before: the error held what the batch had taken
            notice(f"out of memory: going on with {size} tokens a batch")
    return BlockLosses(nll, size, compiled=faster is not None and faster.is_used)


def check_vocabulary(blocks: Blocks, vocabulary: int) -> None:
    """Raise CkptfuseError when a token is outside of the vocabulary."""
    highest = int(blocks.tokens.max())
    if highest >= vocabulary:
        raise CkptfuseError(
            f"token {highest} of the text is outside of the model's vocabulary of {vocabulary}; "
            "is corpus.tokenizer the tokenizer that this model was trained with?"
        )


def groups(blocks: Blocks) -> Iterator[NDArray[np.intp]]:
    """Indices of the blocks of one length and one context, which can be scored together."""
    order = np.lexsort((blocks.context, blocks.lengths))[::-1]  # the longest first: they show
    shapes = np.stack([blocks.lengths[order], blocks.context[order]])  # at once if memory is short
    borders = np.flatnonzero(np.any(np.diff(shapes), axis=0)) + 1
    for group in np.split(order, borders):
        yield np.sort(group)


def _rows_of(blocks: Blocks, alike: NDArray[np.intp], size: int) -> int:
    """Blocks of a batch of about ``size`` tokens, for blocks of one length."""
    return max(size // int(blocks.lengths[alike[0]]), 1)


def _commonest_batch(blocks: Blocks, size: int) -> tuple[tuple[int, int], int]:
    """The shape of batches that most tokens are scored in, and how many tokens those are."""
    tokens: Counter[tuple[int, int]] = Counter()
    for alike in groups(blocks):
        rows, length = _rows_of(blocks, alike, size), int(blocks.lengths[alike[0]])
        tokens[rows, length] += len(alike) // rows * rows * length
    return tokens.most_common(1)[0]


def _rows(blocks: Blocks, rows: NDArray[np.intp]) -> tuple[torch.Tensor, int]:
    tokens = np.stack([blocks.block(int(index)) for index in rows]).astype(np.int64)
    return torch.from_numpy(tokens), int(blocks.context[rows[0]])


def _halved(rows: NDArray[np.intp], blocks: Blocks, error: torch.OutOfMemoryError) -> int:
    length = int(blocks.lengths[rows[0]])
    if len(rows) == 1:
        raise _too_large(length, error) from error
    return len(rows) // 2 * length


def _too_large(length: int, error: torch.OutOfMemoryError) -> CkptfuseError:
    return CkptfuseError(
        f"a single block of {length} tokens does not fit into the device's memory ({error}); "
        "set scoring.block_length lower, or score on a larger device"
    )


def _fitting(losses: TokenLosses, blocks: Blocks) -> int:
    """The tokens of one forward pass that suit the device."""
    if losses.device.type == "cpu":
        return CPU_BATCH_TOKENS
    tokens, context = _rows(blocks, next(groups(blocks))[:1])
    torch.cuda.reset_peak_memory_stats(losses.device)
    before = torch.cuda.memory_allocated(losses.device)
    try:
        losses(tokens, context)
    except torch.OutOfMemoryError as error:
        raise _too_large(tokens.shape[1], error) from error
    taken = torch.cuda.max_memory_allocated(losses.device) - before
    free, _ = torch.cuda.mem_get_info(losses.device)
    kept = torch.cuda.memory_reserved(losses.device) - torch.cuda.memory_allocated(losses.device)
    free += kept  # by torch, for whoever asks next
    fitting = max(int(GPU_SHARE * free / taken), 1)
    # A power of two of blocks: a little more or less free memory then changes nothing.
    return min(tokens.numel() << (fitting.bit_length() - 1), GPU_BATCH_TOKENS)
