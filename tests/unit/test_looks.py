"""What a look leaves for monitoring: when it began, what waited, whether it came to its end."""

import logging
import time
from pathlib import Path

import pytest

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.listing import Listing, Refused
from ckptfuse.looks import LookFile, Pending
from ckptfuse.protocol import Numerics
from ckptfuse.steps.look import look_file
from tasks import news
from tests.helpers import make_service, write_checkpoint

NUMERICS = Numerics(dtype="float32", attention="sdpa", device_class="cpu")


def a_checkpoint(folder: Path) -> Checkpoint:
    import torch

    return write_checkpoint(folder / "checkpoint-100", {"w": torch.zeros(4)})


def test_before_the_first_look_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert LookFile(tmp_path / "cache").last() is None


def test_looks_that_do_not_end_are_counted_until_one_does(tmp_path: Path) -> None:
    file = LookFile(tmp_path)
    before = time.time()
    file.begin()
    file.begin()
    last = file.last()
    assert last is not None
    assert (last.unfinished, last.ended) == (2, None)
    assert before <= last.begun <= time.time()
    unread = Pending(name="step100", signature="s100", reason="access denied")
    file.end(held=(unread,), waits="step 100: MLflow is down")
    last = file.last()
    assert last is not None
    assert (last.unfinished, last.held) == (0, (unread,))
    assert last.waits == "step 100: MLflow is down"
    assert last.ended is not None
    assert last.ended >= last.begun


def test_what_waits_is_kept_through_the_end_and_the_next_beginning(tmp_path: Path) -> None:
    file, waiting = LookFile(tmp_path / "cache"), a_checkpoint(tmp_path)
    file.begin()
    file.found(
        Listing(complete=(waiting,)), [waiting], corpus="c", tokenizer="t", numerics=NUMERICS
    )
    file.end(held=(), waits=None)
    file.begin()
    last = file.last()
    assert last is not None
    assert (last.complete, last.incomplete, last.corpus) == (1, (), "c")
    assert last.numerics == NUMERICS
    (queued,) = last.queue
    assert (queued.signature, queued.step) == (waiting.signature, 100)
    assert queued.written == waiting.modified


def test_why_a_checkpoint_is_not_complete_is_told_when_it_is_first_seen_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service(tmp_path)
    caplog.set_level(logging.INFO, "ckptfuse")
    half = a_checkpoint(tmp_path)

    def look(reason: str | None) -> None:
        refused = () if reason is None else (Refused(half, reason),)
        listing = Listing(incomplete=refused)
        news.incomplete(service, listing)
        look_file(service).found(listing, [], corpus="c", tokenizer="t", numerics=NUMERICS)

    look("last written 3 s ago")
    look("last written 9 s ago")
    assert caplog.messages == ["checkpoint-100 is not complete yet: last written 3 s ago"]
    last = look_file(service).last()
    assert last is not None
    assert [item.reason for item in last.incomplete] == ["last written 9 s ago"]
    look(None)
    look("no config.json yet")
    assert caplog.messages[1:] == ["checkpoint-100 is not complete yet: no config.json yet"]


def test_a_file_of_another_version_is_no_look(tmp_path: Path) -> None:
    (tmp_path / "look.json").write_text('{"began": 1}')
    assert LookFile(tmp_path).last() is None
    LookFile(tmp_path).begin()
    assert LookFile(tmp_path).last() is not None
