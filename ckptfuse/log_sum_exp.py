"""The logarithm of the sum of exponentials of each row of logits, computed in float32.

With m the largest value of a row, log sum exp = m + log sum_j exp(x_j - m). On a GPU one kernel
reads the logits once (log_sum_exp_kernel.py); torch's own operations read and write them several
times, a tenth of all the time that scoring takes there.
"""

from collections.abc import Callable
from functools import cache

import torch

_LOWEST = torch.finfo(torch.float32).min

#: Logits [N, C] -> largest value and sum of exponentials of each row, float32 [N] both.
LargestAndSum = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def log_sum_exp_(logits: torch.Tensor) -> torch.Tensor:
    """Of each row of [N, C], float64 [N]. May overwrite float32 logits."""
    reduce = (kernel() if logits.is_cuda else None) or _by_torch
    largest, summed = reduce(logits)
    return summed.double().log_() + largest


def _by_torch(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.logsumexp`` makes new tiles on its way and takes twice as long."""
    largest = logits.amax(dim=1, keepdim=True).float()
    largest.clamp_(min=_LOWEST)  # of a row of -inf, so that none is taken from another
    above = logits.sub_(largest) if logits.dtype == torch.float32 else logits - largest
    return largest[:, 0], above.exp_().sum(dim=1)


@cache
def kernel() -> LargestAndSum | None:
    """The GPU's kernel; None where there can be none."""
    try:
        return load_kernel()
    except Exception:
        return None


def load_kernel() -> LargestAndSum:
    """The GPU's kernel, compiled and tried. Raises whatever compiler and driver do."""
    from ckptfuse.log_sum_exp_kernel import largest_and_sum

    largest_and_sum(torch.zeros(1, 1, device="cuda"))
    return largest_and_sum
