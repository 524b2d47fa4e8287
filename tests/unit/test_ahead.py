"""Imports ahead of a publication: in a thread while a job scores, never beside anything else."""

import time
from collections.abc import Callable

import pytest

from ckptfuse.errors import JobError
from ckptfuse.jobs import ModelScores
from ckptfuse.protocol import Event, Numerics, Request
from tasks import ahead
from tasks.ahead import ImportingAhead

REQUEST = Request(
    models=(),
    blocks=(),
    numerics=Numerics(dtype="float32", attention="sdpa", device_class="cpu"),
    records="/nowhere",
)


class Scores:
    """Answers, or fails as a job that died does."""

    def __init__(self, *, dies: bool) -> None:
        self.dies = dies
        self.ready = False

    def prepare(self) -> None:
        self.ready = True

    def run(
        self, request: Request, gpus_per_job: int, *, progress: Callable[[Event], None]
    ) -> list[ModelScores]:
        if self.dies:
            raise JobError("killed")
        return [ModelScores(fingerprint=f"of {gpus_per_job}")]


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was imported; it takes a while, and longer than the scores."""
    names: list[str] = []

    def import_slowly() -> None:
        time.sleep(0.2)
        names.append("mlflow")

    monkeypatch.setattr(ahead, "_import", import_slowly)
    return names


def test_the_scores_are_those_of_the_runner_within(imported: list[str]) -> None:
    within = Scores(dies=False)
    runner = ImportingAhead(within)
    runner.prepare()
    assert within.ready
    assert runner.run(REQUEST, 2) == [ModelScores(fingerprint="of 2")]
    assert imported == ["mlflow"], "whole before the caller goes on"


def test_no_import_goes_on_beside_what_follows_a_job_that_died(imported: list[str]) -> None:
    with pytest.raises(JobError, match="killed"):
        ImportingAhead(Scores(dies=True)).run(REQUEST, 1)
    assert imported == ["mlflow"]
