"""One model on token blocks: the summed negative log-likelihood of each block.

For a block of tokens t_0 .. t_n the model predicts t_1 .. t_n from what stands before each::

    nll = - sum_{k=1..n} log softmax(logits_{k-1})[t_k]          nats
    loss = sum nll / sum n,   perplexity = exp(loss)

(https://huggingface.co/docs/transformers/perplexity). Logits are taken to float32 before the
log-softmax, whatever the model computes in, and summed per block in float64. The logits of one
forward pass hold at most ``LOGIT_BYTES``, so memory does not grow with vocabulary x batch.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ckptfuse.blocks import Blocks
from ckptfuse.errors import CkptfuseError

LOGIT_BYTES = 512 * 1024 * 1024


def score_blocks(
    model: torch.nn.Module,
    blocks: Blocks,
    *,
    vocabulary: int,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> NDArray[np.float64]:
    """Negative log-likelihood of each block in nats, float64 [B], in the order of the blocks.

    ``model`` is a causal language model on one device, ``vocabulary`` its number of embeddings.
    Raises CkptfuseError when a token is outside of the vocabulary.
    """
    highest = int(blocks.tokens.max())
    if highest >= vocabulary:
        raise CkptfuseError(
            f"token {highest} of the text is outside of the model's vocabulary of {vocabulary}; "
            "is corpus.tokenizer the tokenizer that this model was trained with?"
        )
    limit = min(batch_tokens, LOGIT_BYTES // (4 * vocabulary))
    nll = np.empty(len(blocks), dtype=np.float64)
    for start, stop in batches(blocks, limit):
        nll[start:stop] = _batch_nll(model, blocks, start, stop)
        progress(stop)
    return nll


def batches(blocks: Blocks, limit: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive blocks of one length, at most ``limit`` tokens (at least one block)."""
    start = 0
    while start < len(blocks):
        length = int(blocks.lengths[start])
        stop = start + 1
        while (
            stop < len(blocks)
            and int(blocks.lengths[stop]) == length
            and (stop + 1 - start) * length <= limit
        ):
            stop += 1
        yield start, stop
        start = stop


def _batch_nll(
    model: torch.nn.Module, blocks: Blocks, start: int, stop: int
) -> NDArray[np.float64]:
    device = next(model.parameters()).device
    rows = np.stack([blocks.block(index) for index in range(start, stop)]).astype(np.int64)
    tokens = torch.from_numpy(rows).to(device)
    with torch.inference_mode():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        losses = [
            torch.nn.functional.cross_entropy(row.float(), targets, reduction="none")
            for row, targets in zip(logits, tokens[:, 1:], strict=True)
        ]
        return torch.stack(losses).double().sum(dim=1).cpu().numpy()
