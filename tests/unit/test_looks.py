"""What a look leaves for monitoring: when it began, what waited, whether it came to its end."""

import time
from pathlib import Path

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.listing import Listing
from ckptfuse.looks import LookFile
from ckptfuse.protocol import Numerics
from tests.helpers import write_checkpoint

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
    file.end(held=1, waits=True)
    last = file.last()
    assert last is not None
    assert (last.unfinished, last.held, last.waits) == (0, 1, True)
    assert last.ended is not None
    assert last.ended >= last.begun


def test_what_waits_is_kept_through_the_end_and_the_next_beginning(tmp_path: Path) -> None:
    file, waiting = LookFile(tmp_path / "cache"), a_checkpoint(tmp_path)
    file.begin()
    file.found(Listing(complete=(waiting,)), [waiting], corpus="c", numerics=NUMERICS)
    file.end(held=0, waits=False)
    file.begin()
    last = file.last()
    assert last is not None
    assert (last.complete, last.incomplete, last.corpus) == (1, 0, "c")
    assert last.numerics == NUMERICS
    (queued,) = last.queue
    assert (queued.signature, queued.step) == (waiting.signature, 100)
    assert queued.written == waiting.modified


def test_a_file_of_another_version_is_no_look(tmp_path: Path) -> None:
    (tmp_path / "look.json").write_text('{"began": 1}')
    assert LookFile(tmp_path).last() is None
    LookFile(tmp_path).begin()
    assert LookFile(tmp_path).last() is not None
