"""Which GPUs a job gets. None is needed: they are named by the environment."""

import pytest

from ckptfuse.devices import VISIBLE, slots, visible_gpus
from ckptfuse.errors import ConfigurationError


def test_the_environment_says_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "3, 5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.setenv(VISIBLE, "")
    assert visible_gpus() == []


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
