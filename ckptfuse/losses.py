"""Losses of models over the same blocks, and paired differences between two of them.

For one domain with blocks b in documents g: loss = sum_b nll_b / sum_b tokens_b, in nats per
token, in float64. Its standard error takes documents as clusters, by linearisation of the ratio
(Cochran, Sampling Techniques, 1977, ch. 9; Cameron and Miller, J. Human Resources 50, 2015)::

    r_g = sum_{b in g} (nll_b - loss * tokens_b)
    var = G / (G - 1) * sum_g r_g^2 / (sum_b tokens_b)^2

The difference of two models is the same formula on nll_b(first) - nll_b(second): what makes a
document hard cancels. Losses of several domains combine as a weighted mean; domains share no
document, so their variances add with squared weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptfuse.errors import RecordError


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean in nats per token, its standard error, and how many documents stand behind it."""

    mean: float
    standard_error: float
    documents: int


@dataclass(frozen=True)
class Losses:
    """One model on one set of blocks, all arrays [B].

    ``nll`` float64: summed negative log-likelihood in nats; ``tokens`` int64: predicted tokens;
    ``domain`` and ``document`` int32 as in Blocks; ``bytes`` int64.
    """

    blocks: str
    domains: tuple[str, ...]
    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]
    domain: NDArray[np.int32]
    document: NDArray[np.int32]

    def of(self, domain: str) -> Estimate:
        """Loss of one domain."""
        return self._estimate(self.nll, domain)

    def by_domain(self) -> dict[str, Estimate]:
        return {name: self.of(name) for name in self.domains}

    def target(self, weights: Mapping[str, float]) -> Estimate:
        """Weighted mean of the domains' losses: the target loss."""
        return combine(self.by_domain(), weights)

    def _estimate(self, nll: NDArray[np.float64], domain: str) -> Estimate:
        chosen = self.domain == self.domains.index(domain)
        return _ratio(nll[chosen], self.tokens[chosen], self.document[chosen])

    def minus(self, other: "Losses") -> dict[str, Estimate]:
        """Per domain, this loss less the other's, paired block by block.

        Raises RecordError when the two were not measured on the same blocks.
        """
        if self.blocks != other.blocks:
            raise RecordError(
                f"losses on blocks {self.blocks[:12]} and {other.blocks[:12]} cannot be compared"
            )
        difference = self.nll - other.nll
        return {name: self._estimate(difference, name) for name in self.domains}

    def documents(self, domain: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Summed nll and predicted tokens of each document of a domain, [G] each."""
        chosen = self.domain == self.domains.index(domain)
        _, cluster = np.unique(self.document[chosen], return_inverse=True)
        nll = np.bincount(cluster, weights=self.nll[chosen])
        return nll.astype(np.float64), np.bincount(cluster, self.tokens[chosen]).astype(np.float64)

    def totals(self, domain: str) -> tuple[int, int]:
        """Predicted tokens and their UTF-8 bytes."""
        chosen = self.domain == self.domains.index(domain)
        return int(self.tokens[chosen].sum()), int(self.bytes[chosen].sum())


def _ratio(
    nll: NDArray[np.float64], tokens: NDArray[np.int64], documents: NDArray[np.int32]
) -> Estimate:
    total = float(tokens.sum())
    mean = math.fsum(nll) / total
    _, cluster = np.unique(documents, return_inverse=True)
    residuals = np.bincount(cluster, weights=nll - mean * tokens)
    count = len(residuals)
    if count < 2:
        return Estimate(mean, math.inf, count)
    variance = count / (count - 1) * float(residuals @ residuals) / total**2
    return Estimate(mean, math.sqrt(variance), count)


def combine(estimates: Mapping[str, Estimate], weights: Mapping[str, float]) -> Estimate:
    """Weighted mean over domains; ``weights`` need not sum to 1. Weight 0 leaves a domain out."""
    counted = {name: weights.get(name, 1.0) for name in estimates}
    total = sum(counted.values())
    mean = variance = 0.0
    documents = 0
    for name, weight in counted.items():
        if weight > 0:
            mean += weight / total * estimates[name].mean
            variance += (weight / total * estimates[name].standard_error) ** 2
            documents += estimates[name].documents
    return Estimate(mean, math.sqrt(variance), documents)


def perplexity(loss: float) -> float | None:
    """exp(loss); None where that exceeds float64."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def bits_per_byte(loss: float, *, tokens: int, byte_count: int) -> float:
    """Loss in bits per UTF-8 byte of text, comparable between tokenizers; NaN without bytes."""
    return loss * tokens / byte_count / math.log(2) if byte_count else math.nan
