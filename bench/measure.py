"""Whole processes: how long they took and the most memory they held; the machine; the results."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_LIBRARIES = ("numpy", "ml_dtypes", "torch", "transformers", "safetensors")
RESULTS = Path(__file__).with_name("results")

#: To Linux a process's peak is at least what the one that started it held: so a small one does.
_LAUNCH = """
import resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.call(sys.argv[2:])
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
open(sys.argv[1], "w").write(f"{seconds} {peak}")
sys.exit(status != 0)
"""


@dataclass(frozen=True, slots=True)
class Process:
    """One finished process: wall seconds, peak resident MiB, and what it printed."""

    seconds: float
    peak_mib: float
    output: str


def run(command: Sequence[str]) -> Process:
    """Run a command to its end; raises RuntimeError with its words when it fails."""
    with tempfile.NamedTemporaryFile("r") as told:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCH, told.name, *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_quiet(),
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
        seconds, kib = map(float, told.read().split())
    return Process(seconds, kib / 1024, done.stdout)


def _quiet() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        **{name: _version(name) for name in _LIBRARIES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def write_results(name: str, about: Mapping[str, str], figures: object, text: str) -> None:
    """``results/NAME.json`` with every figure and ``results/NAME.md`` for people; printed too."""
    RESULTS.mkdir(exist_ok=True)
    values = json.dumps({"machine": about, "figures": figures}, indent=1)
    (RESULTS / f"{name}.json").write_text(f"{values}\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def read_results(name: str, about: Mapping[str, str]) -> dict[str, Any]:
    """The figures of ``results/NAME.json``; raises RuntimeError if another machine's."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    if found["machine"] != about:
        raise RuntimeError(f"{name}.json is of another machine: {found['machine']}")
    return found["figures"]  # type: ignore[no-any-return]
