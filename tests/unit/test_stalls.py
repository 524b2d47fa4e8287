"""When a trainer has fallen silent."""

import time
from pathlib import Path

import pytest

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.listing import Listing
from ckptfuse.stalls import silence
from ckptfuse.store import Entry
from tasks import news
from tests.helpers import checkpoint_record, make_service


def test_three_times_the_usual_pause_is_silence() -> None:
    written = [float(n) for n in range(0, 1000, 100)]
    assert silence(written, now=1190.0) is None
    assert silence(written, now=1210.0) == (310.0, 100.0)


def test_what_is_usual_is_what_was_lately_and_one_long_pause_does_not_change_it() -> None:
    slow = [1000.0 * n for n in range(5)]
    fast = [9000.0 + 10 * n for n in range(12)]
    assert silence([*slow, *fast], now=9150.0) == (40.0, 10.0)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_of_too_few_checkpoints_nothing_is_said(count: int) -> None:
    assert silence([float(n) for n in range(count)], now=1e9) is None


def test_silence_is_told_once_for_each_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(news, "tell", lambda _, *what: told.append(what))
    service = make_service(tmp_path)
    began = time.time() - 600
    for n in range(4):
        record = checkpoint_record(n, modified=began + 20 * n)
        service.records.put(record.signature, record)
    news.stalled(service, Listing())
    news.stalled(service, Listing())
    ((event, step, text),) = told
    assert (event, step) == ("trajectory.stalled", 3)
    assert str(text).startswith("no checkpoint for 0:09:0")
    assert str(text).endswith("where 0:00:20 is usual; the newest is step3")


def test_a_trainer_whose_checkpoints_wait_to_be_scored_is_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news, "tell", lambda *_: pytest.fail("it wrote a moment ago"))
    service = make_service(tmp_path)
    began = time.time() - 600
    for n in range(4):
        record = checkpoint_record(n, modified=began + 20 * n)
        service.records.put(record.signature, record)
    file = Entry("model.safetensors", 1, "1", time.time())
    waiting = Checkpoint("step30", "/bucket/step30", 30, None, None, (file,))
    news.stalled(service, Listing(complete=(waiting,)))
