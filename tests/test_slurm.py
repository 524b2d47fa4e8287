"""The scripts of infra/: what shells say of them, and the Slurm job told that its time is up."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.command_lines import parse
from tests.conftest import BINARIES

INFRA = Path(__file__).parent.parent / "infra"
WORKER = INFRA / "slurm" / "worker.sbatch"
SCRIPTS = [WORKER, *sorted(INFRA.rglob("*.sh"))]


def test_shellcheck_finds_nothing_in_any_script() -> None:
    assert len(SCRIPTS) >= 3
    done = subprocess.run(
        [BINARIES / "shellcheck", *SCRIPTS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_bash_can_read_the_job() -> None:
    subprocess.run(["bash", "-n", WORKER], check=True)


def test_slurm_is_told_to_bring_the_job_back() -> None:
    lines = WORKER.read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert "requeue" in options
    assert options["signal"] == "B:USR1@120"  # to the script, which tells the worker
    assert options["open-mode"] == "append"
    assert options["gpus-per-node"] == "1"
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last < first  # Slurm stops reading them at the first command


def test_prefect_knows_the_workers_command_line() -> None:
    text = WORKER.read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.startswith("prefect worker"))
    words = line.partition(" &")[0].split()
    parse([word.strip('"') for word in words if "$" not in word or word.startswith('"slurm')])


@pytest.mark.parametrize(
    ("sent", "requeued"), [(signal.SIGUSR1, "requeue 42\n"), (signal.SIGTERM, "")]
)
def test_the_job_ends_its_worker_and_comes_again_when_its_time_is_up(
    tmp_path: Path, sent: signal.Signals, requeued: str
) -> None:
    """With programs of the same names that write down what they were told."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    told = tmp_path / "told"
    programs = {
        "prefect": f'trap "echo ended >>{told}; exit 0" TERM\n'
        f'echo "$@ on $CUDA_VISIBLE_DEVICES" >>{told}\n'
        "while true; do sleep 0.05; done",
        "scontrol": f'echo "$@" >>{tmp_path}/requeued',
        "nvidia-smi": '[ "$1 $2" = "-i 0" ] && echo GPU-1f8a',
    }
    for name, text in programs.items():
        (binaries / name).write_text(f"#!/bin/bash\n{text}\n")
        (binaries / name).chmod(0o755)
    job = subprocess.Popen(
        ["bash", WORKER],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"], "CKPTFUSE_VENV": str(tmp_path), "SLURM_JOB_ID": "42",
            "CUDA_VISIBLE_DEVICES": "0",
            "PREFECT_API_URL": "http://nowhere/api", "TMPDIR": str(tmp_path),
        },
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    for _ in range(100):
        if told.exists():
            break
        time.sleep(0.05)
    job.send_signal(sent)
    out, _ = job.communicate(timeout=20)
    assert job.returncode == 0, out
    started, ended = told.read_text().splitlines()
    assert "--pool ckptfuse-gpu" in started
    assert started.endswith(" on GPU-1f8a")  # by the name that it has in every job of the node
    assert ended == "ended"
    marker = tmp_path / "requeued"
    assert (marker.read_text() if marker.exists() else "") == requeued
    assert not list(tmp_path.glob("prefect-*"))  # its Prefect home went with it


def test_without_a_server_the_job_says_so_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", WORKER], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "PREFECT_API_URL" in done.stderr
