"""What is pretrained, and what is studied of it. Lengths are in saves, the distance of checkpoints.

No window or threshold was chosen by its outcome. `calibrated` was changed twice after a run. First
`wsd` had shown a fault of it, and `wsd-seed-1` and `wsd-medium` were added to judge the remedy (the
noise share). Then those that were there showed what is left at the end of a decay, and `seed-3`,
`wsd-seed-3` and `gpt-neox-seed-1` were added to judge the guide.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

BLOCK = 256  # tokens of a training example, and the longest context
BURST_STEPS, BURST_FACTOR = 3, 10.0  # of a loss spike: so many steps at so many times the rate


@dataclass(frozen=True, slots=True)
class Run:
    """One pretraining, with AdamW. ``branch``: the save at which a decay to zero leaves it."""

    name: str
    architecture: Literal["llama", "gpt_neox", "mixtral"] = "llama"
    hidden: int = 64
    layers: int = 2
    rate: float = 3e-3
    blocks: int = 4  # training examples in a step
    every: int = 20  # steps between saves
    saves: int = 48
    schedule: Literal["constant", "cosine"] = "constant"
    branch: int | None = None
    branch_saves: int = 10
    bursts: tuple[int, ...] = ()  # saves right before which the rate bursts
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.every * self.saves

    @property
    def tokens_per_step(self) -> int:
        return self.blocks * BLOCK

    @property
    def warmup(self) -> int:
        return 2 * self.every

    def rate_at(self, step: int) -> float:
        """The learning rate of step 1, 2, ... ``steps``."""
        rate = self.rate * min(1.0, step / self.warmup)
        if self.schedule == "cosine" and step > self.warmup:
            share = (step - self.warmup) / (self.steps - self.warmup)
            rate = self.rate * 0.5 * (1 + math.cos(math.pi * share))
        if any(0 <= save * self.every - step < BURST_STEPS for save in self.bursts):
            rate *= BURST_FACTOR
        return rate

    def decay_at(self, step: int) -> float:
        """The rate on the decay branch: linear, zero after its last step."""
        assert self.branch is not None
        done = step - self.branch * self.every
        return self.rate * max(0.0, 1 - done / (self.branch_saves * self.every))


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What is studied: a run's checkpoints, or something made of them.

    ``decays``: the run up to its branch, then the branch. ``spoiled``: save -> how it is damaged.
    ``against_branch``: compute saved is stated against the run's decay branch too.
    """

    name: str
    run: str
    about: str
    sizes: tuple[int, ...] = (8, 20)
    ends: tuple[int, ...] = (34, 48)
    searching: bool = False
    decays: bool = False
    against_branch: bool = False
    spoiled: Mapping[int, str] = field(default_factory=dict)


MANY_SIZES = (5, 8, 12, 20)

RUNS = (
    Run("medium", hidden=128, layers=4, every=16, saves=40, branch=30),
    Run("constant", branch=40),
    Run("low-noise", rate=1.5e-3, blocks=12, every=12),
    Run("mixtral", architecture="mixtral"),
    Run("seed-1", branch=40, seed=1),
    Run("spikes", bursts=(28, 38, 47), seed=2),
    Run("high-noise", rate=6e-3, blocks=2, every=32),
    Run("cosine", schedule="cosine"),
    Run("gpt-neox", architecture="gpt_neox"),
    Run("seed-3", branch=40, seed=3),
    Run("gpt-neox-seed-1", architecture="gpt_neox", seed=1),
)

TRAJECTORIES = (
    Trajectory("constant", "constant", "constant rate, small model", MANY_SIZES, (20, 40, 48),
               searching=True, against_branch=True),
    Trajectory("seed-1", "seed-1", "the same from another seed", MANY_SIZES, (40, 48),
               against_branch=True),
    Trajectory("medium", "medium", "constant rate, a larger model", ends=(30, 40),
               against_branch=True),
    Trajectory("high-noise", "high-noise", "twice the rate, half the batch", MANY_SIZES, (20, 48)),
    Trajectory("low-noise", "low-noise", "half the rate, three times the batch", MANY_SIZES,
               (20, 48)),
    Trajectory("cosine", "cosine", "cosine to zero"),
    Trajectory("wsd", "constant", "the constant run, then a decay to zero", ends=(45, 50),
               decays=True),
    Trajectory("wsd-seed-1", "seed-1", "seed-1, then a decay to zero", ends=(45, 50), decays=True),
    Trajectory("wsd-medium", "medium", "the larger model, then a decay to zero", ends=(35, 40),
               decays=True),
    Trajectory("spikes", "spikes", "three bursts of ten times the rate", ends=(30, 40, 48)),
    Trajectory("damaged", "constant", "three checkpoints of the constant run spoiled",
               ends=(30, 40, 48), searching=True,
               spoiled={28: "noise", 38: "zeroed", 47: "stale"}),
    Trajectory("gpt-neox", "gpt-neox", "another architecture"),
    Trajectory("mixtral", "mixtral", "a Mixture of Experts, 2 of 4"),
    Trajectory("seed-3", "seed-3", "the constant run from a third seed", MANY_SIZES, (40, 48)),
    Trajectory("wsd-seed-3", "seed-3", "seed-3, then a decay to zero", ends=(45, 50), decays=True),
    Trajectory("gpt-neox-seed-1", "gpt-neox-seed-1", "gpt-neox from another seed"),
)  # fmt: skip


def tiny_run(run: Run) -> Run:
    """The same in a fortieth of the steps, to see that everything works."""
    return replace(
        run,
        every=max(run.every // 10, 3),
        saves=run.saves // 4,
        branch=run.branch and run.branch // 4,
        branch_saves=-(-run.branch_saves // 4),
        bursts=tuple(save // 4 for save in run.bursts),
    )


def tiny_trajectory(trajectory: Trajectory) -> Trajectory:
    return replace(
        trajectory,
        sizes=tuple(sorted({max(size // 4, 2) for size in trajectory.sizes})),
        ends=tuple(end // 4 for end in trajectory.ends),
        spoiled={save // 4: how for save, how in trajectory.spoiled.items()},
    )
