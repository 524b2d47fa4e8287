"""The meter that a scoring budget is kept by."""

import json
import time
from pathlib import Path

import pytest

from ckptfuse.meter import DAY, Meter


def written(path: Path, *jobs: tuple[float, float, int]) -> Meter:
    lines = [json.dumps({"ended": e, "hours": h, "models": m}) for e, h, m in jobs]
    path.write_text("".join(f"{line}\n" for line in lines))
    return Meter(path)


def test_jobs_count_for_a_day(tmp_path: Path) -> None:
    now = 10 * DAY
    jobs = (now - DAY - 1, 5.0, 1), (now - DAY + 1, 2.0, 1), (now, 0.5, 1)
    assert written(tmp_path / "m", *jobs).spent(now) == 2.5


def test_what_is_left_is_divided_by_what_a_model_took_lately(tmp_path: Path) -> None:
    meter = written(tmp_path / "m", (100.0, 1.0, 2), (200.0, 0.5, 1))
    assert meter.affordable(4.0, 300.0) == 5
    assert meter.affordable(1.5, 300.0) == 0
    assert meter.affordable(4.0, 300.0 + 2 * DAY) == 8


def test_the_first_model_is_scored_to_measure_it(tmp_path: Path) -> None:
    assert Meter(tmp_path / "none").affordable(0.1, 0.0) == 1


def test_a_model_dearer_than_the_budget_waits_until_that_is_met_on_average(tmp_path: Path) -> None:
    meter = written(tmp_path / "m", (DAY, 5.0, 2))
    assert [meter.affordable(1.0, days * DAY) for days in (1, 2, 3.4)] == [0, 0, 0]
    assert meter.affordable(1.0, 3.5 * DAY) == 1


def test_models_that_failed_cost_their_hours_and_are_no_measure_of_others(tmp_path: Path) -> None:
    meter = written(tmp_path / "m", (100.0, 0.5, 1), (200.0, 0.5, 0))
    assert meter.affordable(3.0, 300.0) == 4
    refused = [(200.0 + n, 1e-6, 0) for n in range(40)]  # by their configuration
    assert written(tmp_path / "r", (100.0, 0.5, 1), *refused).affordable(3.0, 300.0) == 4
    assert written(tmp_path / "n", (100.0, 2.0, 0)).affordable(1.0, 300.0) == 0
    assert written(tmp_path / "n", (100.0, 2.0, 0)).affordable(1.0, 200.0 + DAY) == 1


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    meter = written(tmp_path / "m", (1.0, 1.0, 1))
    with (tmp_path / "m").open("a") as lines:
        lines.write('{"ended": 2.0, "hou')
    assert meter.spent(2.0) == 1.0


def test_what_is_added_counts(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "folder" / "m")
    meter.add(hours=0.25, models=3)
    meter.add(hours=0.5, models=1)
    assert meter.spent(4e9) == 0
    assert meter.spent(time.time() + 1) == pytest.approx(0.75)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is full")
def test_on_a_full_disk_a_job_is_not_counted_and_nothing_else_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m").symlink_to("/dev/full")
    Meter(tmp_path / "m").add(hours=0.25, models=1)
    assert "0.250 hours of scoring were not written down" in caplog.text
    assert "No space left" in caplog.text
