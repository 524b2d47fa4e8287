"""What becomes of checkpoints whose run at a worker failed."""

from pathlib import Path

import pytest

from ckptfuse.jobs import ModelScores
from ckptfuse.protocol import CheckpointModel, Input, Numerics, Request, Scored
from tasks import workers
from tasks.deployments import Attempts, Piece
from tasks.workers import Handed, Workers


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
