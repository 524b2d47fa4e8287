"""Where everything of one study lies, and what it consists of."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptfuse.params import CorpusParams
from experiments.runs import (
    RUNS,
    TRAJECTORIES,
    Run,
    Trajectory,
    tiny_run,
    tiny_trajectory,
)

OUTSIDE = ("prose", "c", "javascript")  # what of these this machine has


@dataclass(frozen=True, slots=True)
class Place:
    """``texts/``, ``runs/NAME``, ``buckets/NAME``, ``studies/NAME``, ``logs/``."""

    root: Path
    tiny: bool = False

    @property
    def texts(self) -> Path:
        return self.root / "texts"

    def runs(self) -> tuple[Run, ...]:
        return tuple(map(tiny_run, RUNS)) if self.tiny else RUNS

    def trajectories(self) -> tuple[Trajectory, ...]:
        return tuple(map(tiny_trajectory, TRAJECTORIES)) if self.tiny else TRAJECTORIES

    def run(self, name: str) -> Run:
        return next(run for run in self.runs() if run.name == name)

    def trajectory(self, name: str) -> Trajectory:
        return next(found for found in self.trajectories() if found.name == name)

    def trained(self, run: str) -> Path:
        """Holds ``main/`` and, where it has a decay branch, ``branch/``."""
        return self.root / "runs" / run

    def bucket(self, trajectory: str) -> Path:
        return self.root / "buckets" / trajectory

    def study(self, trajectory: str) -> Path:
        return self.root / "studies" / trajectory

    def checks(self, trajectory: str) -> Path:
        """The last file of a trajectory's study: when it is there, all is."""
        return self.study(trajectory) / "checks.json"

    def read(self, trajectory: str) -> dict[str, Any]:
        """A trajectory's study and checks, as they were written."""
        study = json.loads((self.study(trajectory) / "study.json").read_text())
        return {"study": study, "checks": json.loads(self.checks(trajectory).read_text())}

    def corpus(self) -> CorpusParams:
        """Held-out text of the training distribution sets weights; the other text none."""
        share = 8 if self.tiny else 1
        tokens = {"selection": 8_192 // share, "audit": 16_384 // share, "report": 8_192 // share}
        idle = {"selection": 1_024, "audit": 4_096 // share, "report": 1_024}
        domains: dict[str, object] = {"python": {"path": str(self.texts / "python.jsonl")}}
        for name in OUTSIDE:
            path = self.texts / f"{name}.jsonl"
            if path.is_file():
                domains[name] = {"path": str(path), "weight": 0.0, "tokens": idle}
        return CorpusParams.model_validate(
            {"domains": domains, "tokens": tokens, "tokens_per_document": 512}
        )
