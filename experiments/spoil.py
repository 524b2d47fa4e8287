"""Buckets for the studies, linked from the runs' checkpoints, some of them damaged on purpose."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from experiments.place import Place

Tensors = Mapping[str, torch.Tensor]
WEIGHTS = "model.safetensors"


def lay_bucket(place: Place, name: str) -> Path:
    """The trajectory's bucket, made anew: hard links, and files of their own where spoiled."""
    trajectory = place.trajectory(name)
    run, bucket = place.run(trajectory.run), place.bucket(name)
    shutil.rmtree(bucket, ignore_errors=True)
    trained = place.trained(run.name)
    saves = run.saves if not trajectory.decays else run.branch or 0
    sources = [trained / "main" / f"checkpoint-{save * run.every}" for save in range(1, saves + 1)]
    if trajectory.decays:
        sources += sorted((trained / "branch").iterdir())
    for source in sources:
        shutil.copytree(source, bucket / source.name, copy_function=os.link)
    for save, how in trajectory.spoiled.items():
        file = bucket / f"checkpoint-{save * run.every}" / WEIGHTS
        early = trained / "main" / f"checkpoint-{max(save // 6, 1) * run.every}" / WEIGHTS
        damaged = _WAYS[how](load_file(file), load_file(early))
        written = file.stat().st_mtime
        file.unlink()  # not the run's own, which it is a link to
        save_file(dict(damaged), file, metadata={"format": "pt"})
        os.utime(file, (written, written))  # or it would pass for a rollback
    return bucket


def _noise(tensors: Tensors, early: Tensors) -> Tensors:
    """As after a bad step: three tenths of each tensor's spread, at random."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: values + 0.3 * values.std() * torch.randn(values.shape, generator=draw)
        for name, values in tensors.items()
    }


def _zeroed(tensors: Tensors, early: Tensors) -> Tensors:
    """As after a lost shard: one of the layers' matrices is zero."""
    lost = max(name for name in tensors if "down_proj" in name)
    return {n: torch.zeros_like(v) if n == lost else v for n, v in tensors.items()}


def _stale(tensors: Tensors, early: Tensors) -> Tensors:
    """As after a mix-up of names: the weights of a much earlier step."""
    return early


_WAYS: Mapping[str, Callable[[Tensors, Tensors], Tensors]] = {
    "noise": _noise,
    "zeroed": _zeroed,
    "stale": _stale,
}
