"""Rules that search: they measure merges until they find no better one."""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ckptfuse.rules.gaussian_process import expected_improvement, fit
from ckptfuse.rules.observation import Evaluate, Observation, Vector, Weights
from ckptfuse.rules.outliers import healthy
from ckptfuse.rules.registry import rule
from ckptfuse.rules.simplex import as_weights, corner, normalised, padded, softmax, uniform_over

#: Merges that `bayes` has measured in one scoring job.
BATCH = 3
#: Nats; below it no further merge is worth its evaluation.
NEGLIGIBLE = 1e-4


@rule("greedy")
def greedy(seen: Observation) -> Evaluate | Weights:
    """Greedy soup (arXiv 2203.05482): in order of loss, keep what does not make the merge worse.

    Uniform over the kept. Cost: K-1 merges, one after the other.
    """
    order = np.argsort(seen.losses, kind="stable")
    kept = np.zeros(len(seen), dtype=bool)
    kept[order[0]] = True
    lowest = float(seen.losses[order[0]])
    for index in order[1:]:
        larger = kept.copy()
        larger[index] = True
        weights = uniform_over(larger)
        merge = seen.measured(weights)
        if merge is None:
            return Evaluate((as_weights(weights),))
        if merge.loss <= lowest:
            kept, lowest = larger, merge.loss
    return Weights(as_weights(uniform_over(kept)), notes={"measured_loss": lowest})


@rule("bayes")
def bayes(
    seen: Observation,
    *,
    evaluations: Annotated[int, Field(ge=1)] = 12,
    space: Literal["simplex", "pairwise"] = "simplex",
) -> Evaluate | Weights:
    """Bayesian optimisation of the merged loss: a Gaussian process and expected improvement.

    ``pairwise`` is the search of arXiv 2403.19390: w = (1 - lambda, lambda) on the two newest
    checkpoints. ``simplex`` looks among all weights of the healthy ones, from three merges that
    are often good (uniform, the newest half, softmax) and the checkpoints themselves. The draws
    are seeded by the number of merges seen, so the same observation has the same answer.

    Cost: ``evaluations`` merges at most, three in a job; fewer when no more than 1e-4 nats can be
    expected of another.
    """
    if len(seen) == 1:
        return Weights((1.0,))
    known = _known(seen, space)
    lowest, weights = min(known, key=lambda pair: pair[0])
    left = evaluations - len(seen.merges)
    asked = _starts(seen, space) if not seen.merges else _promising(seen, known, space)
    fresh = [point for point in asked if seen.measured(point) is None][: min(left, BATCH)]
    if left <= 0 or not fresh:
        return Weights(as_weights(weights), notes={"measured_loss": lowest})
    return Evaluate(tuple(dict.fromkeys(as_weights(point) for point in fresh)))


def _known(seen: Observation, space: str) -> list[tuple[float, Vector]]:
    """Losses and points [K]: the checkpoints that the space holds, and every merge measured."""
    inside = _inside(seen, space)
    singles = [(float(seen.losses[i]), corner(len(seen), int(i))) for i in np.flatnonzero(inside)]
    return singles + [(merge.loss, np.asarray(merge.weights)) for merge in seen.merges]


def _inside(seen: Observation, space: str) -> NDArray[np.bool_]:
    if space == "pairwise":
        return np.arange(len(seen)) >= len(seen) - 2
    return healthy(seen.losses)


def _starts(seen: Observation, space: str) -> list[Vector]:
    if space == "pairwise":
        return [_on_two(len(seen), share) for share in (0.5, 0.75, 0.25)]
    inside = _inside(seen, space)
    recent = np.arange(len(seen)) >= len(seen) // 2
    newest = uniform_over(inside & recent) if (inside & recent).any() else uniform_over(inside)
    soft = normalised(np.where(inside, softmax(seen.losses, 0.1), 0.0))
    return [uniform_over(inside), newest, soft]


def _on_two(count: int, share: float) -> Vector:
    return padded(np.array([1 - share, share]), count)


def _promising(seen: Observation, known: list[tuple[float, Vector]], space: str) -> list[Vector]:
    """A batch by expected improvement, each point believed before the next is chosen."""
    points = np.array([weights for _, weights in known])
    losses = np.array([loss for loss, _ in known])
    candidates = _candidates(seen, points[np.argmin(losses)], space)
    chosen: list[Vector] = []
    process = fit(points, losses)
    for _ in range(BATCH):
        mean, error = process.predict(candidates)
        gains = expected_improvement(mean, error, lowest=float(losses.min()))
        best = int(np.argmax(gains))
        if gains[best] < NEGLIGIBLE:
            break
        chosen.append(candidates[best])
        losses = np.append(losses, mean[best])
        points = np.vstack([points, candidates[best]])
        process = process.believing(points, losses)
    return chosen


def _candidates(seen: Observation, incumbent: Vector, space: str) -> Vector:
    """Points to choose from, [N, K]: spread over the space, and close to the best one so far."""
    count = len(seen)
    if space == "pairwise":
        return np.array([_on_two(count, share) for share in np.linspace(0, 1, 101)])
    inside = np.flatnonzero(_inside(seen, space))
    draw = np.random.default_rng([len(inside), len(seen.merges)])
    wide = np.vstack([draw.dirichlet(np.full(len(inside), a), 256) for a in (1.0, 0.3)])
    centre = incumbent[inside]
    mixed = [(1 - t) * centre + t * other for t in (0.05, 0.15, 0.4) for other in wide[:128]]
    near = np.vstack([wide, *mixed])
    points = np.zeros((len(near), count))
    points[:, inside] = near / near.sum(axis=1, keepdims=True)
    return points
