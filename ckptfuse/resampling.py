"""What a loss would have been on other documents of the same kind: a bootstrap, paired.

Within each domain of G documents, G - 1 are drawn with replacement (one fewer than there are: for
a mean that makes the variance unbiased; Rao and Wu, J. American Statistical Association 83, 1988).
Seeds are fixed, so resample r is the same documents for every model of the same blocks, and any
figure made of several losses (a difference, an energy, a weight) has as its standard error the
standard deviation of that figure over the resamples.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ckptfuse.losses import Losses
from ckptfuse.rules.observation import Measurement

#: The standard deviation of 200 draws is known to 5 %.
RESAMPLES = 200


def measure(losses: Losses, weights: Mapping[str, float]) -> Measurement:
    """What a rule may know of one model; ``weights`` of the domains, as in ``corpus.domains``."""
    domains = {name: _measure_domain(losses, name) for name in losses.domains}
    counted = {name: weights.get(name, 1.0) for name in domains if weights.get(name, 1.0) > 0}
    total = sum(counted.values())
    parts = [weight / total * domains[name].resampled for name, weight in counted.items()]
    known = all(len(part) for part in parts)
    return Measurement(
        loss=losses.target(weights).mean,
        resampled=np.sum(parts, axis=0) if known else np.empty(0),
        domains=domains,
    )


def _measure_domain(losses: Losses, domain: str) -> Measurement:
    number = losses.domains.index(domain)
    chosen = losses.domain == number
    _, cluster = np.unique(losses.document[chosen], return_inverse=True)
    nll = np.bincount(cluster, weights=losses.nll[chosen])
    tokens = np.bincount(cluster, weights=losses.tokens[chosen])
    loss = losses.of(domain).mean
    if len(nll) < 2:
        return Measurement(loss)
    counts = _draws(len(nll), number)
    return Measurement(loss, (counts @ nll) / (counts @ tokens))


def _draws(documents: int, seed: int) -> NDArray[np.float64]:
    """How often each document is drawn, [RESAMPLES, documents]."""
    draw = np.random.default_rng([seed, documents])
    shares = np.full(documents, 1 / documents)
    return draw.multinomial(documents - 1, shares, size=RESAMPLES).astype(np.float64)
