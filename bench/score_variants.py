"""``python -m bench.score_variants SHAPE``: what each part of scoring on a GPU is worth.

The same random-weight Llama and text in one process, batches of one size, one variant after
another; prints tokens a second as it goes. Liger's kernels take part where they are installed.
``--head`` measures the head alone: its loss from hidden states, three ways.
"""

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bench.score_one import Peak, blocks_of, make_model, matrix_rate
from bench.score_shapes import SHAPES, Shape
from ckptfuse import compiled, log_sum_exp, token_losses
from ckptfuse.perplexity import GPU_BATCH_TOKENS, score_blocks

_HEAD_TOKENS = 16_384
_TILE = 16_384  # of the vocabulary


def by_log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """log sum exp from one operation of torch's that reads once, and writes float32."""
    first = torch.log_softmax(logits, dim=1, dtype=torch.float32)[:, 0]
    return (logits[:, 0].float() - first).double()


def fused_norm(norm: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    shape = hidden.shape[-1:]
    return torch.nn.functional.rms_norm(hidden, shape, norm.weight, norm.variance_epsilon)


@contextmanager
def changed(*changes: tuple[object, str, object]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        yield


PLAIN = (compiled, "ENOUGH", math.inf)
VARIANTS: dict[str, tuple[tuple[object, str, object], ...]] = {
    "torch's operations": (PLAIN, (log_sum_exp, "kernel", lambda: None)),
    "torch.log_softmax": (PLAIN, (token_losses, "log_sum_exp_", by_log_softmax)),
    "kernel": (PLAIN,),
    "kernel, rms_norm": (PLAIN, (LlamaRMSNorm, "forward", fused_norm)),
    "kernel, compiled layers": ((compiled, "ENOUGH", 0.0),),
}


def measure(name: str, model: torch.nn.Module, shape: Shape, batch: int, rounds: int) -> None:
    blocks = blocks_of(shape)
    device = next(model.parameters()).device

    def score() -> float:
        found = score_blocks(model, blocks, vocabulary=shape.vocabulary, batch_tokens=batch)
        return float(found.nll.sum())

    peak = Peak(device)
    began = time.perf_counter()
    loss = score() / shape.tokens
    first, above = time.perf_counter() - began, peak.above()
    seconds = sorted(_seconds(score, device) for _ in range(rounds))[rounds // 2]
    rate = shape.tokens / seconds
    utilisation = rate * shape.flop_a_token() / matrix_rate(model)
    print(
        f"{name:24} {rate:9.0f} tokens a second, {utilisation:4.0%}; first pass {first:5.1f} s, "
        f"{above:6.0f} MiB; loss {loss:.6f}",
        flush=True,
    )


def measure_head(model: torch.nn.Module, shape: Shape, rounds: int) -> None:
    weight = model.get_output_embeddings().weight  # type: ignore[operator]
    hidden = torch.randn(_HEAD_TOKENS, shape.hidden, device=weight.device, dtype=weight.dtype)
    targets = torch.randint(0, shape.vocabulary, (_HEAD_TOKENS,), device=weight.device)

    def in_tiles() -> torch.Tensor:
        starts = range(0, len(weight), _TILE)
        tiles = ((start, hidden @ weight[start : start + _TILE].T) for start in starts)
        return token_losses._losses(tiles, targets)

    def whole() -> torch.Tensor:
        logits = (hidden @ weight.T).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    ways = {"in tiles": in_tiles, "whole logits": whole}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="none")
        ways["Liger, fused"] = lambda: fused(weight, hidden, targets)
    for name, way in ways.items():
        with torch.inference_mode():
            way()
            peak = Peak(weight.device)
            seconds = sorted(_seconds(way, weight.device) for _ in range(rounds))[rounds // 2]
        share = 2 * _HEAD_TOKENS * weight.numel() / seconds / matrix_rate(model)
        print(f"{name:16} {seconds * 1e3:8.1f} ms, {share:4.0%}, {peak.above():6.0f} MiB")


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--batch-tokens", type=int, default=GPU_BATCH_TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--head", action="store_true", help="the head alone")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(shape, device)
    if arguments.head:
        measure_head(model, shape, arguments.rounds)
        return
    for name, changes in VARIANTS.items():
        with changed(*changes):
            measure(name, model, shape, arguments.batch_tokens, arguments.rounds)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=True, swiglu=True, rms_norm=True, cross_entropy=False,
            fused_linear_cross_entropy=False, model=model,
        )  # fmt: skip
        with changed(PLAIN):
            measure(
                "kernel, Liger's layers", model, shape, arguments.batch_tokens, arguments.rounds
            )


if __name__ == "__main__":
    main()
