"""Negative log-likelihood of predicted tokens, without logits of batch x length x vocabulary.

    tokens [B, n] --backbone--> hidden [N, H] --head, C of V tokens at a time--> logits [N, C]
                                                                                   |
    nll of each block [B]  <--- log sum exp over all V - logit of the target, float64 --+

The head is the model's own code, whatever it does to its logits (Gemma's soft cap, Cohere's
scale): the model is called with a backbone that answers with the hidden states, and with the rows
of its output embeddings that belong to C tokens. A model that this does not suit, found by trying
it, is called as a whole.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from ckptfuse.errors import CkptfuseError
from ckptfuse.log_sum_exp import log_sum_exp_

#: float32 logits at a time. On a CPU they stay in the caches; a GPU wants large matrix products.
TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 2**30}

#: Tokens of a tile are a multiple of this: the matrix products of a GPU want rows of such lengths.
ALIGNED = 128

#: The first token that logits [N, C] are of, and those logits.
Tile = tuple[int, torch.Tensor]


class TokenLosses:
    """Losses of one causal language model of transformers', on the device where it lies.

    Raises CkptfuseError for a model that reads the tokens that it is to predict.
    """

    def __init__(self, model: Any, *, vocabulary: int) -> None:
        self._model = model
        self.device = next(model.parameters()).device
        self._tile_bytes = TILE_BYTES["cpu" if self.device.type == "cpu" else "cuda"]
        # cuDNN's attention is planned anew for each shape of a batch, and what it computes changes
        # with its version; flash attention's does with torch's alone.
        torch.backends.cuda.enable_cudnn_sdp(False)
        probe = torch.arange(8, device=self.device).remainder(vocabulary).reshape(2, 4)
        self._check_causal(probe)
        self._backbone = self._suiting_backbone(probe)

    @property
    def is_tiled(self) -> bool:
        """Whether the logits of a batch are never whole."""
        return self._backbone is not None

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, context: int) -> torch.Tensor:
        """Summed negative log-likelihood of each row, nats, float64 [B] on the CPU.

        ``tokens`` int64 [B, n]: all but the first ``context`` of each row are predicted.
        """
        tokens = tokens.to(self.device)
        inputs, targets = tokens[:, :-1], tokens[:, context:]
        if self._backbone is None:
            return self._by_rows(inputs, targets).sum(dim=1).cpu()
        return self._by_tiles(self._backbone, inputs, targets).sum(dim=1).cpu()

    def _by_rows(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """float64 [B, n - context], from the logits of the model as it is."""
        logits = self._model(input_ids=inputs, use_cache=False).logits[:, -targets.shape[1] :]
        rows = zip(logits, targets, strict=True)
        return torch.stack([_losses([(0, row.to(self.device))], wanted) for row, wanted in rows])

    def _by_tiles(
        self, backbone: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The same from the head, on some of the vocabulary at a time."""
        width = max(self._tile_bytes // (4 * targets.numel()), 1)
        width = width // ALIGNED * ALIGNED or width
        with closing(self._tiles(backbone, inputs, targets.shape[1], width)) as tiles:
            return _losses(tiles, targets.reshape(-1)).reshape(targets.shape)

    def _tiles(
        self, backbone: torch.nn.Module, inputs: torch.Tensor, last: int, width: int
    ) -> Generator[Tile, None, None]:
        """Logits at the last positions of all rows, of ``width`` tokens at a time."""
        head = self._model.get_output_embeddings()
        output = backbone(input_ids=inputs, use_cache=False)
        hidden = output.last_hidden_state[:, -last:]
        output.last_hidden_state = hidden.reshape(1, -1, hidden.shape[-1])
        positions = inputs[:, -last:].reshape(1, -1)
        size = len(head.weight)
        with _answering(backbone, lambda: output):
            for start in range(0, size, width):
                with _only(head, slice(start, min(start + width, size))):
                    logits = self._model(input_ids=positions, use_cache=False).logits
                yield start, logits[0].to(self.device)  # of a model that is spread over several

    @torch.inference_mode()
    def _check_causal(self, inputs: torch.Tensor) -> None:
        """Another last token must change what follows it, and nothing before.

        transformers builds causal models of encoders too, which read both ways unless told not to,
        and its Doge (5.17) reads ahead with torch's attention.
        """
        others = inputs.clone()
        others[:, -1] = inputs[:, 0]
        logits = [
            self._model(input_ids=tokens, use_cache=False).logits for tokens in (inputs, others)
        ]
        changes = (logits[1].float() - logits[0].float()).nan_to_num(0, 0, 0).abs()
        # In bfloat16 rounding reaches earlier tokens: experts have other tokens beside them.
        tolerance = 1e-3 if logits[0].dtype == torch.float32 else 0.1
        if changes[:, :-1].max() > tolerance * changes[:, -1].max():
            raise CkptfuseError(
                "its predictions change with the tokens that come after them, so it is no causal "
                "language model: an encoder's config.json needs is_decoder, and an attention that "
                "is wrong in this transformers may be right with scoring.attention: eager "
                "(--attention)"
            )

    @torch.inference_mode()
    def _suiting_backbone(self, inputs: torch.Tensor) -> torch.nn.Module | None:
        """The part whose hidden states the head can be given by themselves; None without one.

        Found by what the model calls and not by its name: a model's ``base_model`` may be itself
        (Llama 4), or a wrapper that it does not call (OPT, BART).
        """
        called: list[torch.nn.Module] = []

        def note(module: torch.nn.Module, _: object, output: object) -> None:
            if module is not self._model and hasattr(output, "last_hidden_state"):
                called.append(module)

        with register_module_forward_hook(note):
            whole = self._model(input_ids=inputs, use_cache=False).logits.to(self.device)
        outermost_first = reversed(called)
        return next((part for part in outermost_first if self._suits(part, inputs, whole)), None)

    def _suits(self, backbone: torch.nn.Module, inputs: torch.Tensor, whole: torch.Tensor) -> bool:
        """Whether the head on parts of the vocabulary gives what the whole model gives."""
        try:
            tiles = self._tiles(backbone, inputs, inputs.shape[1], whole.shape[-1] // 2 + 1)
            parts = torch.cat([logits for _, logits in tiles], dim=1).reshape(whole.shape)
        except Exception:  # an architecture may do anything here, and the whole model is right
            return False
        tolerance = 1e-4 if whole.dtype == torch.float32 else 2e-2
        largest = whole.nan_to_num(0, 0, 0).abs().max().item()
        return torch.allclose(parts.float(), whole.float(), rtol=0, atol=tolerance * largest)


def _losses(tiles: Iterable[Tile], targets: torch.Tensor) -> torch.Tensor:
    """Of each target [N], float64, from tiles that together have the logits of every token."""
    total = torch.full(targets.shape, -torch.inf, dtype=torch.float64, device=targets.device)
    chosen = torch.zeros_like(total)
    for start, logits in tiles:
        if logits.device.type == "cpu":  # there a sum of two types is slow; on a GPU one more copy
            logits = logits.float()
        column = targets - start
        here = (column >= 0) & (column < logits.shape[1])
        found = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        chosen = torch.where(here, found.double(), chosen)
        total = torch.logaddexp(total, log_sum_exp_(logits))
    return total - chosen


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


@contextmanager
def _only(head: torch.nn.Module, rows: slice) -> Iterator[None]:
    """Within, the head has these rows of its weight, and of its bias if it has one."""
    whole = dict(head.named_parameters(recurse=False))
    for name, value in whole.items():
        setattr(head, name, torch.nn.Parameter(value[rows], requires_grad=False))
    try:
        yield
    finally:
        for name, value in whole.items():
            setattr(head, name, value)
