"""Servers as processes that outlive who started them: each with a log, a pid file and a way to end.

A pid alone may by now be another process's: the time at which it started is kept with it.
"""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptfuse.errors import CkptfuseError

PATIENCE = 120.0  # seconds for a server to answer; a busy machine takes most of a minute


@dataclass(frozen=True, slots=True)
class Daemon:
    """One server: a name, and the folder of its log and its pid file."""

    name: str
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        """Start it unless it runs."""
        if self.is_running():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            started = subprocess.Popen(
                [str(part) for part in command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.adopt(started.pid)

    def adopt(self, pid: int) -> None:
        """Remember a process that was started in a session of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps({"pid": pid, "started": _started(pid)}))

    def is_running(self) -> bool:
        return self.pid() is not None

    def wait_for(self, url: str) -> None:
        """Until it answers HTTP, whatever it says; raises CkptfuseError with the end of its log."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.is_running():
            try:
                urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - on loopback
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.2)
        tail = self.log.read_text(errors="replace")[-2000:]
        raise CkptfuseError(f"{self.name} does not answer at {url}; from {self.log}:\n{tail}")

    def stop(self, how: signal.Signals = signal.SIGTERM, patience: float = 20.0) -> None:
        """End it and what it started: first politely, then not."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, how)
            deadline = time.monotonic() + patience
            while self.is_running() and time.monotonic() < deadline:
                time.sleep(0.1)
            _kill_session(pid)
        self._file.unlink(missing_ok=True)

    def pid(self) -> int | None:
        """None when it does not run."""
        try:
            known = json.loads(self._file.read_text())
        except (FileNotFoundError, ValueError):
            return None
        pid = int(known["pid"])
        return pid if _started(pid) == known["started"] else None


def _started(pid: int) -> str | None:
    """The time at which a process started, in the kernel's ticks; None when it has ended."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else fields[19]


def _kill_session(leader: int) -> None:
    """Children that were left behind: the session bears the number of its leader."""
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields is not None and fields[0] != "Z" and int(fields[3]) == leader:
            try:
                os.kill(int(entry.name), signal.SIGKILL)
            except ProcessLookupError:
                continue


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on: state, parent, group, session, ..."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
