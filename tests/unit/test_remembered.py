"""A look at a bucket with very many checkpoints lists few of them, and finds the same."""

import time
from pathlib import Path

import pytest
import torch

from ckptfuse import remembered
from ckptfuse.listing import Listing
from ckptfuse.records import CheckpointRecord
from ckptfuse.service import Service
from ckptfuse.steps.look import discover
from ckptfuse.store import FolderStore
from tests.helpers import checkpoint_record, make_service, write_checkpoint


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    """Six checkpoints, all known, where more than four are many; windows are of two."""
    monkeypatch.setattr(remembered, "MANY", 4)
    bucket = tmp_path / "bucket"
    service = make_service(tmp_path, bucket=str(bucket), window={"size": 2, "minimum": 2})
    for n in range(1, 7):
        remember(service, write_checkpoint(bucket / f"step{n}", {"w": torch.full((2,), float(n))}))
    return service


def remember(service: Service, found: object) -> None:
    record = checkpoint_record(
        found.step, name=found.name, uri=found.uri, signature=found.signature  # type: ignore[attr-defined]
    )  # fmt: skip
    service.records.put(record.signature, record)


def listing_of(service: Service) -> Listing:
    return discover(service)[0]


@pytest.fixture
def listed(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is listed of the bucket from now on."""
    asked: list[str] = []
    real = FolderStore.list

    def counting(self: FolderStore, prefix: str = "") -> object:
        if self.uri == service.params.bucket:
            asked.append(prefix)
        return real(self, prefix)

    monkeypatch.setattr(FolderStore, "list", counting)
    return asked


def test_after_one_look_at_all_only_new_and_recent_ones_are_listed(
    service: Service, listed: list[str]
) -> None:
    first = listing_of(service)
    assert listed == [""]
    listed.clear()
    again = listing_of(service)
    assert sorted(listed) == ["step5/", "step6/"]
    assert [c.signature for c in again.complete] == [c.signature for c in first.complete]
    assert [isinstance(c, CheckpointRecord) for c in again.complete] == [True] * 4 + [False] * 2

    listed.clear()
    bucket = Path(str(service.params.bucket))
    write_checkpoint(bucket / "step7", {"w": torch.ones(2)})
    (bucket / "step8").mkdir()  # nothing in it yet
    (bucket / "logs").mkdir()
    found = listing_of(service)
    assert sorted(listed) == ["step5/", "step6/", "step7/", "step8/"]
    assert [c.name for c in found.complete] == [f"step{n}" for n in range(1, 8)]
    assert list(found.architectures) == [found.complete[-1].signature]


def test_a_checkpoint_that_was_deleted_is_gone_and_one_written_over_is_seen_within_the_hour(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Path(str(service.params.bucket))
    before = listing_of(service).complete
    for path in (bucket / "step1").iterdir():
        path.unlink()
    (bucket / "step1").rmdir()
    write_checkpoint(bucket / "step2", {"w": torch.zeros(3)})
    found = listing_of(service).complete
    assert [c.step for c in found] == [2, 3, 4, 5, 6]
    assert found[0].signature == before[1].signature

    monkeypatch.setattr(remembered, "HOUR", 0.0)
    assert listing_of(service).complete[0].signature != before[1].signature


def test_a_recent_one_that_is_written_over_is_seen_at_once(service: Service) -> None:
    bucket = Path(str(service.params.bucket))
    before = listing_of(service).complete
    write_checkpoint(bucket / "step6", {"w": torch.zeros(3)})
    after = listing_of(service).complete
    assert after[-1].signature != before[-1].signature
    assert [c.signature for c in after[:-1]] == [c.signature for c in before[:-1]]


def test_what_is_remembered_of_checkpoints_without_a_record_is_not_relied_on(
    service: Service, listed: list[str]
) -> None:
    listing_of(service)
    folder = service.workspace.root / "records" / "checkpoint"
    min(folder.iterdir()).unlink()
    listed.clear()
    assert len(listing_of(service).complete) == 6
    assert len(listed) == 3


@pytest.mark.parametrize("text", ["", "{", '{"at": 1}'])
def test_a_memory_that_was_cut_off_costs_one_listing_of_all(
    service: Service, listed: list[str], text: str
) -> None:
    listing_of(service)
    (service.workspace.folder("cache") / "listing.json").write_text(text)
    listed.clear()
    assert len(listing_of(service).complete) == 6
    assert listed == [""]


def test_a_memory_from_a_time_to_come_is_not_relied_on(
    service: Service, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listing_of(service)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 86_400)  # it was a day ahead
    listed.clear()
    listing_of(service)
    assert listed == [""]
