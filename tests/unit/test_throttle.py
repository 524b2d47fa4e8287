"""Caps on reading: what they count, whom they bind, and where they come from."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ckptfuse import job
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.listing import Conventions, find
from ckptfuse.params import Params
from ckptfuse.protocol import Numerics, Request
from ckptfuse.reading import load
from ckptfuse.scoring import _reading
from ckptfuse.service import open_service
from ckptfuse.store import FolderStore, open_store, throttle
from ckptfuse.store.throttle import Limits, Throttle
from tests.helpers import write_checkpoint
from tests.servers import S3Server


@pytest.fixture(autouse=True)
def no_caps_afterwards() -> Iterator[None]:
    yield
    throttle.configure(Limits())


class Clock:
    """Time that passes only when someone sleeps."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def throttle_of(clock: Clock, megabytes: float | None, requests: float | None) -> Throttle:
    return Throttle(Limits(megabytes, requests), clock=clock, sleep=clock.sleep)


def test_each_request_waits_until_those_before_it_are_paid_for() -> None:
    clock = Clock()
    capped = throttle_of(clock, 2.0, None)
    starts = []
    for _ in range(4):
        capped.wait(1_000_000)
        starts.append(clock.now)
    assert starts == [1_000.0, 1_000.5, 1_001.0, 1_001.5]


def test_requests_are_counted_whatever_their_size() -> None:
    clock = Clock()
    capped = throttle_of(clock, None, 4.0)
    for _ in range(9):
        capped.wait(0)
    assert clock.now == 1_002.0


def test_the_tighter_of_the_two_caps_decides() -> None:
    clock = Clock()
    capped = throttle_of(clock, 1.0, 10.0)
    for size in (0, 0, 3_000_000, 0):
        capped.wait(size)
    assert clock.now == pytest.approx(1_003.2)


def test_what_was_not_known_before_is_paid_for_by_the_next() -> None:
    clock = Clock()
    capped = throttle_of(clock, 1.0, None)
    capped.wait(0)
    capped.spent(2_000_000)
    assert clock.now == 1_000.0
    capped.wait(0)
    assert clock.now == 1_002.0


def test_idle_time_saves_nothing_up() -> None:
    clock = Clock()
    capped = throttle_of(clock, 1.0, None)
    capped.wait(1_000_000)
    clock.now += 60
    for _ in range(3):
        capped.wait(1_000_000)
    assert clock.now == 1_062.0


def test_all_threads_share_one_cap(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1_000_000)
    throttle.configure(Limits(megabytes_per_second=2.0))
    stores = [open_store(tmp_path) for _ in range(4)]
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda store: store.read_range("file", 0, 250_000), stores))
    assert time.monotonic() - started >= 0.375  # three of the four wait for 250 kB before them


def seconds_of(limits: Limits, work: object, own: tuple[Path, ...] = ()) -> float:
    throttle.configure(Limits())
    throttle.configure(limits, own=own)
    started = time.monotonic()
    work()  # type: ignore[operator]
    return time.monotonic() - started


def test_listings_headers_loads_and_fingerprints_of_a_bucket_are_capped(tmp_path: Path) -> None:
    opened = write_checkpoint(tmp_path / "checkpoint-100", {"a": torch.ones(100)})
    limits = Limits(requests_per_second=20.0)
    assert seconds_of(limits, lambda: find(open_store(tmp_path), Conventions())) >= 0.15
    assert seconds_of(limits, lambda: load(opened)) >= 0.15
    assert seconds_of(limits, lambda: fingerprint_of(opened)) >= 0.05


def test_s3_is_capped_by_the_same_rule(moto_s3: S3Server, tmp_path: Path) -> None:
    store = open_store(f"s3://bucket/{tmp_path.name}")
    store.write("file", b"x" * 100_000)

    def read() -> None:
        capped = open_store(store.uri)
        capped.list()
        capped.stat("file")
        capped.read("file")
        capped.read_range("file", 0, 100_000)
        capped.child("none").list()

    assert seconds_of(Limits(1.0, None), read) >= 0.2
    assert seconds_of(Limits(None, 10.0), read) >= 0.4


def test_the_services_own_folders_and_stores_made_directly_are_free(tmp_path: Path) -> None:
    for folder in ("records", "bucket"):
        FolderStore(tmp_path / folder).write("file", b"x")
    throttle.configure(Limits(requests_per_second=1.0), own=[tmp_path / "records"])
    free = Limits()
    assert throttle.of(str(tmp_path / "records" / "score")).limits == free
    assert throttle.of(str(tmp_path / "records-of-another")).limits != free
    assert throttle.of(str(tmp_path / "bucket")).limits != free
    assert throttle.of("s3://bucket/run").limits != free


def test_the_same_limits_again_go_on_counting(tmp_path: Path) -> None:
    throttle.configure(Limits(requests_per_second=1.0))
    first = throttle.of("s3://bucket/run")
    throttle.configure(Limits(requests_per_second=1.0), own=[tmp_path])
    assert throttle.of("s3://bucket/run") is first
    throttle.configure(Limits(requests_per_second=2.0))
    assert throttle.of("s3://bucket/run") is not first


def test_a_service_keeps_to_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTFUSE_READING__MEGABYTES_PER_SECOND", "12.5")
    params = Params.model_validate(
        {"workspace": str(tmp_path / "workspace"), "reading": {"requests_per_second": 40}}
    )
    open_service(params)
    assert throttle.limits() == Limits(12.5, 40.0)
    assert throttle.of(str(tmp_path / "workspace" / "records")).limits == Limits()
    assert throttle.of(str(tmp_path / "workspace" / "bucket")).limits == Limits(12.5, 40.0)


def test_a_scoring_job_keeps_to_what_its_parent_is_held_to(tmp_path: Path) -> None:
    throttle.configure(Limits(12.5, 40.0), own=[tmp_path / "records"])
    request = Request(
        models=(),
        blocks=(),
        numerics=Numerics(dtype="float32", attention="sdpa", device_class="cpu"),
        records=str(tmp_path / "records"),
        batch_tokens=1,
        reading=_reading(),
    )
    (tmp_path / "request.json").write_text(request.model_dump_json())
    throttle.configure(Limits())
    job.main(str(tmp_path / "request.json"))
    assert throttle.limits() == Limits(12.5, 40.0)
    assert throttle.own() == (tmp_path / "records",)


def test_a_merge_by_hand_takes_caps_as_flags(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step{step}", {"a": torch.ones(100)})
    command = [sys.executable, "-m", "flows.cli", "merge"]
    pairs = [f"{tmp_path}/step1=0.5", f"{tmp_path}/step2=0.5"]
    flags = ["--requests-per-second", "5", "--megabytes-per-second", "1000"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "out"), *pairs, *flags], check=True)
    assert time.monotonic() - started >= 2.0
    told = subprocess.run(
        [*command, str(tmp_path / "again"), *pairs, "--requests-per-second", "0"],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 2
    assert "--requests-per-second 0: more than 0 is expected" in told.stderr
