"""What scoring has cost lately: a meter beside the records, to keep to a budget by.

One JSON line a job, and one more for what failed in it. It is no state: a lost line loses no
result, only some of the count.
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

DAY = 24 * 3600.0

log = logging.getLogger("ckptfuse")


@dataclass(frozen=True, slots=True)
class _Job:
    ended: float  # seconds since the epoch
    hours: float  # of all its GPUs together; of the CPU where there is none
    models: int  # scored in it; 0: these hours went into models that failed


class Meter:
    """The scoring jobs of one workspace."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, *, hours: float, models: int) -> None:
        """Count a job that has just ended. What it found must not be lost for want of a line."""
        line = {"ended": round(time.time(), 1), "hours": round(hours, 6), "models": models}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning(
                "%.3f hours of scoring were not written down, and scoring.hours_per_day will not "
                "count them: %s",
                hours,
                error,
            )

    def spent(self, now: float) -> float:
        """Hours of the jobs that ended in the 24 hours before ``now``."""
        return sum(job.hours for job in self._jobs() if now - DAY < job.ended <= now)

    def total(self) -> float:
        """Hours of all jobs that are remembered."""
        return sum(job.hours for job in self._jobs())

    def affordable(self, hours_per_day: float, now: float) -> int:
        """How many more models a daily budget allows, judged by what the last jobs took.

        Before anything was measured: one, to measure. A model that takes more than a day's budget
        is due when as many days have passed as it takes budgets, so that these are met on average.
        """
        left = hours_per_day - self.spent(now)
        if left <= 0:
            return 0
        recent = [job for job in self._jobs() if job.models and job.hours][-20:]
        if not recent:
            return 1
        each = sum(job.hours for job in recent) / sum(job.models for job in recent)
        if each > hours_per_day:
            return int(now - recent[-1].ended >= DAY * each / hours_per_day)
        return int(left / each)

    def _jobs(self) -> list[_Job]:
        if not self._file.is_file():
            return []
        jobs = []
        for line in self._file.read_text().splitlines():
            try:
                jobs.append(_Job(**json.loads(line)))
            except (ValueError, TypeError):  # cut off by a kill
                continue
        return jobs
