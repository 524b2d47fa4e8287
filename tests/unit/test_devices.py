"""Which GPUs a job gets. None is needed: they are named by the environment."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckptfuse import devices
from ckptfuse.devices import VISIBLE, claim, slots, visible_gpus
from ckptfuse.errors import ConfigurationError


def test_the_environment_says_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "3, 5")
    assert visible_gpus() == ["3", "5"]
    for none in ("", "-1", "NoDevFiles", " ,0"):
        monkeypatch.setenv(VISIBLE, none)
        assert visible_gpus() == []
    monkeypatch.setenv(VISIBLE, "MIG-7,1,-1,2")
    assert visible_gpus() == ["MIG-7", "1"], "CUDA reads the list up to the first that is none"


def test_each_job_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1,2,GPU-5af3,4")
    assert slots("cuda", 1) == [{VISIBLE: gpu} for gpu in ("0", "1", "2", "GPU-5af3", "4")]
    assert slots("cuda", 2) == [{VISIBLE: "0,1"}, {VISIBLE: "2,GPU-5af3"}]


def test_a_cpu_has_one_job() -> None:
    assert slots("cpu", 4) == [{}]


def test_too_few_gpus_for_one_job_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    with pytest.raises(ConfigurationError, match=r"gpus_per_job is 2.* shows 1 GPUs"):
        slots("cuda", 2)


# -- claims ------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from ckptfuse import devices
devices.LOCKS = Path(sys.argv[1])
with devices.claim([{devices.VISIBLE: gpu} for gpu in sys.argv[2].split()], 1) as free:
    print(free[0][devices.VISIBLE], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of locks of the test's own: the machine's may be in use."""
    folder = tmp_path / "locks"
    monkeypatch.setattr(devices, "LOCKS", folder)
    return folder


def hold(locks: Path, gpus: str) -> subprocess.Popen[str]:
    """Another process that holds the first of these GPUs until its input ends."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(locks), gpus],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline().strip() == gpus.split()[0]
    return other


def test_a_gpu_that_another_process_holds_is_passed_over_and_then_waited_for(
    locks: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "_PAUSE", 0.01)
    wanted = [{VISIBLE: "0"}, {VISIBLE: "1"}]
    other = hold(locks, "0 1")
    with claim(wanted, 2) as free:
        assert free == [{VISIBLE: "1"}]
        second: list[object] = []
        waits = threading.Thread(target=lambda: second.extend(enter(wanted)))
        with caplog.at_level("INFO", logger="ckptfuse"):
            waits.start()
            waits.join(0.2)
        assert not second, "both are held, one by us"
        assert "waiting for a GPU" in caplog.text
        other.kill()  # a lock ends with its process, however that ends
        other.wait()
        waits.join(10)
        assert second == [{VISIBLE: "0"}]


def enter(wanted: list[dict[str, str]]) -> list[object]:
    with claim(wanted, 1) as free:
        return list(free)


def test_a_job_on_two_gpus_takes_both_or_none(locks: Path) -> None:
    other = hold(locks, "1")
    with claim([{VISIBLE: "0,1"}, {VISIBLE: "2,3"}], 2) as free:
        assert free == [{VISIBLE: "2,3"}]
        with claim([{VISIBLE: "0"}], 1) as single:
            assert single == [{VISIBLE: "0"}], "it was let go again"
    other.kill()
    other.wait()


UUIDS = ["GPU-6b1c0000-1111-2222-3333-444455556666", "GPU-5af30000-1111-2222-3333-444455556666"]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The driver's files of two GPUs; of a third it does not know the UUID yet."""
    unknown = "GPU-????????-????-????-????-????????????"
    for place, uuid in zip(("0000:01:00.0", "0000:41:00.0", "0000:81:00.0"), [*UUIDS, unknown],
                           strict=True):  # fmt: skip
        (tmp_path / "gpus" / place).mkdir(parents=True)
        about = f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 91\nGPU UUID: \t {uuid}\nDevice Minor: 0\n"
        (tmp_path / "gpus" / place / "information").write_text(about)
    monkeypatch.setattr(devices, "_GPUS", tmp_path / "gpus")
    return tmp_path / "gpus"


@pytest.mark.usefixtures("driver", "locks")
@pytest.mark.parametrize(
    ("held", "asked"),
    [("0", UUIDS), ("0", ["GPU-6b1c", "1"]), (UUIDS[0], ["0", "1"]), ("GPU-6b1c", ["0", UUIDS[1]])],
)
def test_a_gpu_is_held_whether_it_is_named_by_its_number_or_its_uuid(
    held: str, asked: list[str]
) -> None:
    wanted = [{VISIBLE: gpu} for gpu in asked]
    with claim([{VISIBLE: held}], 1), claim(wanted, 2) as free:
        assert free == wanted[1:]


@pytest.mark.usefixtures("driver", "locks")
def test_a_gpu_whose_uuid_the_driver_does_not_tell_is_held_by_its_number() -> None:
    with claim([{VISIBLE: "2"}], 1), claim([{VISIBLE: "2"}, {VISIBLE: "1"}], 2) as free:
        assert free == [{VISIBLE: "1"}]


def test_a_cpu_is_shared() -> None:
    with claim([{}], 1) as one, claim([{}], 1) as other:
        assert one == other == [{}]
