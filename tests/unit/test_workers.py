"""What becomes of checkpoints whose run at a worker failed."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import flows.score
from ckptfuse.jobs import ModelScores
from ckptfuse.protocol import CheckpointModel, Input, Numerics, Request, Scored
from tasks import workers
from tasks.deployments import Attempts, Piece
from tasks.workers import Handed, Workers
from tests.helpers import make_service


@pytest.mark.parametrize("poisoned", [{"step200"}, {"step100", "step200", "step300"}])
def test_a_run_that_failed_fails_its_own_checkpoint_and_is_asked_again_by_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: set[str]
) -> None:
    handed: list[list[str]] = []

    def hand_over(_: str, pieces: list[Piece], __: Attempts) -> dict[str, str]:
        handed.append([piece.name for piece in pieces])
        failures = {}
        for piece in pieces:
            if piece.name.removeprefix("score ") in poisoned:
                failures[piece.key] = "its worker was killed"
            else:
                scored = Scored(model=0, model_id=piece.name, seconds=1.0, tokens=1)
                Handed(tmp_path).give(piece.key, [ModelScores(scored=scored)])
        return failures

    monkeypatch.setattr(workers, "hand_over", hand_over)
    names = ["step100", "step200", "step300"]
    request = Request(
        models=tuple(CheckpointModel(input=Input(uri=f"/bucket/{name}")) for name in names),
        blocks=(),
        numerics=Numerics(dtype="float32", attention="sdpa", device_class="cpu"),
        records=str(tmp_path),
    )
    answers = Workers("trial", tmp_path).run(request, 1)
    assert [answer.failed is not None for answer in answers] == [n in poisoned for n in names]
    told = {answer.failed.reason for answer in answers if answer.failed is not None}
    assert told == {"its score run failed: its worker was killed"}
    Workers("trial", tmp_path).run(request, 1)
    assert handed[1] == handed[0], "nothing is left of the first questions"


def test_a_second_run_waits_for_one_that_the_server_took_for_dead_and_scores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ckptfuse")
    service = make_service(tmp_path)
    handed = Handed(service.workspace.folder("cache"))
    request = Request(
        models=(CheckpointModel(input=Input(uri="/bucket/step100")),),
        blocks=(),
        numerics=Numerics(dtype="float32", attention="sdpa", device_class="cpu"),
        records=str(tmp_path),
    )
    handed.ask("key", request)
    at_work, may_end = threading.Event(), threading.Event()
    scored: list[str] = []

    def take_hours(_: Request, __: int, names: str) -> list[ModelScores]:
        scored.append(names)
        at_work.set()
        assert may_end.wait(60)
        return []

    monkeypatch.setattr(flows.score, "open_flow", lambda _: service)
    monkeypatch.setattr(flows.score, "score_for_others", take_hours)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(flows.score.score.fn, "params.yaml", "key")
        assert at_work.wait(60)
        second = pool.submit(flows.score.score.fn, "params.yaml", "key")
        while "another run is at this still" not in caplog.text:
            assert not second.done()
            time.sleep(0.01)
        may_end.set()
        first.result(), second.result()
    assert scored == ["step100"]
    assert handed.answer("key") == []
    handed.forget(["key"])
    assert list(handed.store.root.iterdir()) == []


def test_a_run_that_was_killed_is_waited_for_no_longer(tmp_path: Path) -> None:
    handed = Handed(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "mine\n"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_pass, handed)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=2)
        holder.kill()
        waiting.result(timeout=60)
    holder.communicate()


_HOLD = """
import sys, time
from pathlib import Path
from tasks.workers import Handed
with Handed(Path(sys.argv[1])).alone("key"):
    print("mine", flush=True)
    time.sleep(600)
"""


def _pass(handed: Handed) -> None:
    with handed.alone("key"):
        pass
