"""Negative log-likelihood of predicted tokens, without logits of batch x length x vocabulary.

    tokens [B, n] --backbone--> hidden states [N, H] --head, C positions at a time--> logits [C, V]
                                                                                        |
    nll of each block [B], float64  <-----------------------------------------  nll [C], float32

The head is the model's own code, whatever it does to its logits (Gemma's soft cap, Cohere's
scale): the model is called with a backbone that answers with the hidden states of one chunk.
A model that this does not suit, found by trying it, is called as a whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: float32 logits of one chunk. On a CPU they should stay near the caches; a GPU needs many
#: positions a chunk, or it spends its time on reading the head's weights.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


class TokenLosses:
    """Losses of one causal language model of transformers', on the device where it lies."""

    def __init__(self, model: Any, *, vocabulary: int) -> None:
        self._model = model
        self.device = next(model.parameters()).device
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        self._chunk = max(CHUNK_BYTES[kind] // (4 * vocabulary), 1)
        probe = torch.arange(8, device=self.device).remainder(vocabulary).reshape(2, 4)
        self._logits = self._by_chunks if self._suits(probe) else self._whole

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, context: int) -> torch.Tensor:
        """Summed negative log-likelihood of each row, nats, float64 [B] on the CPU.

        ``tokens`` int64 [B, n]: all but the first ``context`` of each row are predicted.
        """
        tokens = tokens.to(self.device)
        targets = tokens[:, context:]
        flat = targets.reshape(-1)
        losses = torch.empty(flat.shape, dtype=torch.float32, device=self.device)
        done = 0
        for logits in self._logits(tokens[:, :-1], context - 1):
            end = done + len(logits)
            losses[done:end] = torch.nn.functional.cross_entropy(
                logits.float(), flat[done:end], reduction="none"
            )
            done = end
        return losses.reshape(targets.shape).double().sum(dim=1).cpu()

    def _whole(self, inputs: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        """Logits [n - first, V] of each row, from the model as it is."""
        for row in self._model(input_ids=inputs, use_cache=False).logits:
            yield row[first:].to(self.device)

    def _by_chunks(self, inputs: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        """Logits [C, V] of all rows' positions from ``first`` on, C at a time."""
        backbone = self._model.base_model
        output = backbone(input_ids=inputs, use_cache=False)
        hidden = output.last_hidden_state[:, first:]
        hidden = hidden.reshape(1, -1, hidden.shape[-1])
        positions = inputs[:, first:].reshape(1, -1)
        with _answering(backbone, lambda: output):
            for start in range(0, hidden.shape[1], self._chunk):
                part = slice(start, start + self._chunk)
                output.last_hidden_state = hidden[:, part]
                logits = self._model(input_ids=positions[:, part], use_cache=False).logits
                yield logits[0].to(self.device)  # of a model that is spread over several

    @torch.inference_mode()
    def _suits(self, inputs: torch.Tensor) -> bool:
        """Whether the head alone, on hidden states, gives what the whole model gives."""
        if self._model.base_model is self._model:
            return False
        try:
            chunks = torch.cat(list(self._by_chunks(inputs, 1)))
        except Exception:  # an architecture may do anything here, and the whole model is right
            return False
        whole = torch.cat(list(self._whole(inputs, 1)))
        if chunks.shape != whole.shape:
            return False
        tolerance = 1e-4 if whole.dtype == torch.float32 else 2e-2
        difference = (chunks.float() - whole.float()).abs().max()
        return bool(difference <= tolerance * whole.abs().max())


@contextmanager
def _answering(module: torch.nn.Module, answer: Callable[[], Any]) -> Iterator[None]:
    """Within, calling ``module`` gives ``answer()``."""
    own = module.__dict__.get("forward")
    module.forward = lambda *_, **__: answer()
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
