"""Largest value and sum of exponentials of each row of logits: a kernel that reads them once.

Triton comes with torch's builds for GPUs. Import this only where there is one.
"""

import torch
import triton
import triton.language as tl

_WIDTH = 4_096  # values of a row at a time
_WARPS = 8


def largest_and_sum(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """max_j x_j and sum_j exp(x_j - max) of each row of [N, C] on a GPU: float32 [N] both.

    Values of any floating dtype, rows one after another in memory or further apart; summed in
    float32. A row of -inf has the sum 0, one that holds NaN or +inf has NaN.
    """
    largest = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    summed = torch.empty_like(largest)
    with torch.cuda.device(logits.device):
        _reduce[(len(logits),)](
            logits, logits.stride(0), logits.stride(1), logits.shape[1], largest, summed,
            WIDTH=_WIDTH, num_warps=_WARPS,
        )  # fmt: skip
    return largest, summed


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(logits, row_stride, stride, columns, largest_of, sum_of, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * row_stride
    largest = -float("inf")
    total = 0.0
    for start in range(0, columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        x = tl.load(values + column * stride, mask=column < columns, other=-float("inf"))
        x = x.to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        base = tl.where(larger == -float("inf"), 0.0, larger)  # -inf less -inf is none
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(x - base), axis=0)
        largest = larger
    tl.store(largest_of + row, largest)
    tl.store(sum_of + row, total)
