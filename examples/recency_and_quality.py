"""A weight rule of one's own: perplexity weights that also forget.

    rule: {name: "examples.recency_and_quality:recency_and_quality", options: {tau: 0.05}}

in params.yaml; the module has to be importable (PYTHONPATH) wherever ckptfuse or `dvc repro` runs.
"""

import numpy as np

from ckptfuse.rules import Observation, Weights


def recency_and_quality(seen: Observation, *, tau: float = 0.1, half_life: float = 4.0) -> Weights:
    """w_i proportional to exp(-l_i / tau) 2^(-age / half_life), age in checkpoints."""
    age = np.arange(len(seen))[::-1]
    scores = (seen.losses.min() - seen.losses) / tau - age * np.log(2) / half_life
    weights = np.exp(scores - scores.max())
    return Weights(tuple((weights / weights.sum()).tolist()))
