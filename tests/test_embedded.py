"""Prefect's embedded server, which a watch has where no server is named."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import lay_modules_of_a_team

#: A flow before and a flow after the server was killed, in one process.
PROGRAM = """
import os, signal
from pathlib import Path
from flows.environment import prepare
Path("workspace").mkdir()
prepare(Path("workspace"))
from prefect import flow
from prefect.server.api.server import SubprocessASGIServer
from flows.opening import start_server

@flow(persist_result=False)
def answer() -> int:
    return 42

start_server()
assert answer() == 42
first = SubprocessASGIServer().server_process
start_server()
assert SubprocessASGIServer().server_process is first, "it is alive"
os.kill(first.pid, signal.SIGKILL)
first.wait()
start_server()
assert SubprocessASGIServer().server_process is not first
assert answer() == 42
"""


def test_a_server_that_was_killed_is_started_again(tmp_path: Path) -> None:
    lay_modules_of_a_team(tmp_path)
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        cwd=tmp_path,
        env={**surroundings, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "workspace" / "prefect" / "prefect.db").is_file()
