"""The loss model of `calibrated` on weights that it would never choose: predicted and measured."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptfuse.rules.energy import LossModel, energy_of
from ckptfuse.rules.outliers import healthy
from ckptfuse.rules.simplex import as_weights, uniform_over
from ckptfuse.study.measure import Bench

RANDOM = 3  # weight vectors a window, each of another kind


def predictions(bench: Bench, seed: int) -> dict[str, Any]:
    """On selection text, which the predictions are of. Damaged checkpoints get no weight."""
    among = healthy(bench.seen.losses)
    probe = uniform_over(among)
    vectors = _random(among, seed)
    bench.score([as_weights(probe), *vectors], ("selection",))
    measured = bench.evaluate((as_weights(probe), *vectors))
    energy = energy_of(bench.seen, probe, measured[0])
    model = LossModel(bench.seen, among, energy, len(among))
    found = []
    for vector, merge in zip(vectors, measured[1:], strict=True):
        expected = model.prediction(np.asarray(vector))
        found.append(
            {
                "predicted": expected.loss,
                "measured": merge.loss,
                "standard_error": expected.error_beside(merge),
            }
        )
    return {
        "noise_energy": energy.value,
        "noise_energy_error": energy.standard_error,
        "noise_energy_is_shown": energy.is_shown,
        "predictions": found,
    }


def _random(among: NDArray[np.bool_], seed: int) -> list[tuple[float, ...]]:
    """Spread over the simplex, near its borders, and equal weights on a random half."""
    draw = np.random.default_rng([seed, len(among)])
    inside = np.flatnonzero(among)
    vectors = []
    for kind in range(RANDOM):
        if kind < 2:
            drawn = draw.dirichlet(np.full(len(inside), (1.0, 0.3)[kind]))
        else:
            drawn = np.zeros(len(inside))
            half = draw.choice(len(inside), max(len(inside) // 2, 1), replace=False)
            drawn[half] = 1 / len(half)
        whole = np.zeros(len(among))
        whole[inside] = drawn / drawn.sum()
        vectors.append(as_weights(whole))
    return vectors
