"""What a publication needs takes ten seconds to import: that passes while a job scores.

MLflow packages a model with transformers and torch in the service's own process. They come in a
thread, only while this process waits for others: two threads in one circle of imports would see
modules half made.
"""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread

from ckptfuse.jobs import ModelScores, Runner
from ckptfuse.protocol import Event, Request


@dataclass(frozen=True, slots=True)
class ImportingAhead:
    """A runner whose caller finds more imported when the scores are there."""

    runner: Runner

    def prepare(self) -> None:
        self.runner.prepare()

    def run(
        self,
        request: Request,
        gpus_per_job: int,
        *,
        progress: Callable[[Event], None] = lambda event: None,
    ) -> list[ModelScores]:
        thread = Thread(target=_import, name="imports")
        thread.start()
        try:
            return self.runner.run(request, gpus_per_job, progress=progress)
        finally:
            thread.join()


def _import() -> None:
    with contextlib.suppress(Exception):  # whoever needs it imports it again, and tells
        importlib.import_module("mlflow.transformers")
        importlib.import_module("ckptfuse.report.figures")  # matplotlib
        # Made when it is asked for, which takes most of the time.
        getattr(importlib.import_module("transformers"), "Pipeline")  # noqa: B009
