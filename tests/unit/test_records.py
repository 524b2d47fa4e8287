"""Records: written once, whole or not at all, and read back as they were."""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ckptfuse import records as records_module
from ckptfuse.errors import MissingFile, RecordError
from ckptfuse.record_files import Records
from ckptfuse.records import (
    CheckpointRecord,
    DomainScore,
    PlanRecord,
    Record,
    ScoreRecord,
    SkipRecord,
)
from ckptfuse.store import FolderStore, open_store
from tests.forked import run_forked
from tests.helpers import checkpoint_record
from tests.servers import S3Server


def skip(reason: str = "superseded") -> SkipRecord:
    return SkipRecord(window="w", step=100, reason=reason)


def score() -> ScoreRecord:
    domain = DomainScore(
        loss=0.1 + 0.2, standard_error=None, perplexity=None, bits_per_byte=1e-17, tokens=10,
        bytes=40, documents=1,
    )  # fmt: skip
    return ScoreRecord(
        model="m", blocks="b", split="audit", numerics="n", batch_tokens=64,
        domains={"text": domain},
    )  # fmt: skip


def unwritable() -> ScoreRecord:
    """A record with a loss that is no number, which JSON cannot say."""
    bad = score().domains["text"].model_copy(update={"loss": float("nan")})
    return score().model_copy(update={"domains": {"text": bad}})


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(FolderStore(tmp_path))


def kinds() -> list[type[Record]]:
    return sorted(Record.__subclasses__(), key=lambda kind: kind.kind)


def test_a_plan_of_an_earlier_version_is_read_as_it_was(records: Records) -> None:
    """Without revision, measured merges, remarks and errors, which came later."""
    member = {
        "name": "step100", "uri": "/b/step100", "step": 100, "signature": "s",
        "fingerprint": "f", "weight": 1.0, "loss": 2.0,
    }  # fmt: skip
    old = {
        "schema_version": 1, "code": "0.1.0", "window": "w", "step": 100, "rule": "calibrated",
        "tokenizer": "t", "members": [member], "ancillary": "f", "dtype": None, "fusion": "id",
        "notes": {"noise_energy": 0.1}, "params": "p",
    }  # fmt: skip
    records.store.write("plan/key.json", json.dumps(old).encode())
    plan = records.get(PlanRecord, "key")
    assert plan is not None
    assert (plan.revision, plan.merges, plan.remarks, plan.no_gain) == (0, [], [], None)
    assert plan.members[0].weight_error is None


def test_every_kind_has_a_name_of_its_own() -> None:
    names = [kind.kind for kind in kinds()]
    assert len(names) == len(set(names))
    assert {"checkpoint", "score", "plan", "fusion", "gate", "promotion", "skip"} <= set(names)


def test_a_record_comes_back_as_it_was(records: Records) -> None:
    records.put("a", checkpoint_record(100))
    records.put("b", score())
    assert records.get(CheckpointRecord, "a") == checkpoint_record(100)
    assert records.get(ScoreRecord, "b") == score()


def test_what_was_never_written_is_none(records: Records) -> None:
    assert records.get(SkipRecord, "a") is None
    assert not records.has(SkipRecord, "a")
    assert records.all(SkipRecord) == {}
    with pytest.raises(MissingFile):
        records.arrays(ScoreRecord, "a")


def test_the_first_record_of_a_key_stands(records: Records) -> None:
    records.put("a", skip("first"))
    records.put("a", skip("second"))
    assert records.get(SkipRecord, "a") == skip("first")


def test_kinds_do_not_share_their_keys(records: Records) -> None:
    records.put("a", skip())
    assert not records.has(CheckpointRecord, "a")
    records.put("a", checkpoint_record(100))
    assert records.all(SkipRecord) == {"a": skip()}
    assert records.all(CheckpointRecord) == {"a": checkpoint_record(100)}


def test_the_same_record_has_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        Records(FolderStore(tmp_path / folder)).put("a", score(), {"nll": np.arange(3.0)})
    written = [
        {path.name: path.read_bytes() for path in (tmp_path / folder / "score").iterdir()}
        for folder in ("one", "two")
    ]
    assert written[0]["a.json"] == written[1]["a.json"]
    about = json.loads(written[0]["a.json"])
    assert about["schema_version"] == records_module.SCHEMA
    assert about["code"]


def test_arrays_come_back_bit_for_bit(records: Records) -> None:
    arrays = {
        "nll": np.array([0.1, np.pi, 1e300]),
        "tokens": np.array([1, 2**40]),
        "domain": np.array([0, 1], dtype=np.int32),
    }
    records.put("a", score(), arrays)
    found = records.arrays(ScoreRecord, "a")
    assert found.keys() == arrays.keys()
    for name, expected in arrays.items():
        assert found[name].dtype == expected.dtype
        assert found[name].tobytes() == expected.tobytes()


def test_arrays_alone_are_no_record_and_are_written_again(tmp_path: Path) -> None:
    """A process was killed between the two: the record is made once more."""
    store = FolderStore(tmp_path)
    store.write("score/a.npz", b"of a process that was killed")
    records = Records(store)
    assert not records.has(ScoreRecord, "a")
    assert records.all(ScoreRecord) == {}
    records.put("a", score(), {"nll": np.ones(2)})
    assert records.arrays(ScoreRecord, "a")["nll"].tolist() == [1, 1]


def test_arrays_lie_there_before_their_record(records: Records, tmp_path: Path) -> None:
    """A record that is there is whole: what cannot be written as JSON leaves the arrays alone."""
    with pytest.raises(ValueError, match="JSON compliant"):
        records.put("a", unwritable(), {"nll": np.ones(2)})
    assert [path.name for path in (tmp_path / "score").iterdir()] == ["a.npz"]
    assert not records.has(ScoreRecord, "a")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"window": "w", "step": "many", "reason": ""}',
        b'{"window": "w", "step": 1}',
        b'{"window": "w", "step": 1, "reason": "", "surprise": 1}',
    ],
)
def test_a_record_that_cannot_be_read_is_named_with_its_file(tmp_path: Path, text: bytes) -> None:
    store = FolderStore(tmp_path)
    store.write("skip/a.json", text)
    for read in (lambda r: r.get(SkipRecord, "a"), lambda r: r.all(SkipRecord)):
        with pytest.raises(RecordError, match=r"skip/a\.json is not a skip record"):
            read(Records(store))


@pytest.mark.parametrize("text", [b"", b"PK", b"no archive"])
def test_arrays_that_are_damaged_are_named_with_their_file(tmp_path: Path, text: bytes) -> None:
    store = FolderStore(tmp_path)
    store.write("score/a.npz", text)
    with pytest.raises(RecordError, match=r"score/a\.npz is damaged"):
        Records(store).arrays(ScoreRecord, "a")


def test_pickled_arrays_are_not_opened(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    with (tmp_path / "evil.npz").open("wb") as out:
        np.savez(out, nll=np.array([{"code": "that runs"}], dtype=object))
    store.write("score/a.npz", (tmp_path / "evil.npz").read_bytes())
    with pytest.raises(RecordError, match="allow_pickle=False"):
        Records(store).arrays(ScoreRecord, "a")


def test_records_live_in_a_bucket_as_in_a_folder(tmp_path: Path, moto_s3: S3Server) -> None:
    records = Records(open_store(f"s3://bucket/{tmp_path.name}"))
    assert records.get(ScoreRecord, "a") is None
    records.put("a", score(), {"nll": np.ones(2)})
    records.put("a", score().model_copy(update={"split": "report"}))
    assert records.all(ScoreRecord) == {"a": score()}
    assert records.arrays(ScoreRecord, "a")["nll"].tolist() == [1, 1]


def write_many() -> None:
    """A program: three processes that write the same records, all at once."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_twenty) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    sys.exit(any(writer.exitcode for writer in writers))


def _write_twenty() -> None:
    records = Records(FolderStore(Path(sys.argv[1])))
    for number in range(20):
        records.put(str(number), skip(), {"x": np.ones(1000)})


def test_processes_that_write_the_same_records_at_once_do_not_disturb_each_other(
    tmp_path: Path,
) -> None:
    """Not forks of ours: they would take along the threads of servers' clients."""
    program = ("tests.unit.test_records:write_many", [str(tmp_path)], Path.cwd(), os.environ)
    records = Records(FolderStore(tmp_path))
    with ThreadPoolExecutor(1) as beside:
        writing = beside.submit(run_forked, *program)
        while not writing.done():
            assert all(record == skip() for record in records.all(SkipRecord).values())
    assert writing.result().returncode == 0, writing.result().stderr
    assert len(records.all(SkipRecord)) == 20
    assert sorted(path.suffix for path in (tmp_path / "skip").iterdir()) == (
        [".json"] * 20 + [".npz"] * 20
    )
