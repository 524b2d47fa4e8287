"""Programs of the service in processes forked from one that has imported what they import.

Such a process differs from a fresh one in the seconds of imports that it does not spend. What
reads its environment when it is imported, as Prefect does, needs a fresh one. The fork server of
its scoring jobs is a fork of the same, for it has loaded all that those need and run none of it.
"""

import atexit
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel

from ckptfuse import job_forkserver, jobs
from ckptfuse.modeling import load_transformers
from ckptfuse.processes import end_with_parent


class Program(BaseModel):
    """A function of no arguments, and the process in which it runs."""

    function: str  # module:name
    arguments: list[str]
    folder: str
    environment: dict[str, str]
    output: str
    errors: str


def run_forked(
    function: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run``, of ``MODULE:FUNCTION``, which finds ``arguments`` in ``sys.argv``."""
    with tempfile.TemporaryDirectory(prefix="ckptfuse-forked-") as scratch:
        output, errors = Path(scratch, "output"), Path(scratch, "errors")
        program = Program(
            function=function, arguments=list(arguments), folder=str(folder),
            environment=dict(environment), output=str(output), errors=str(errors),
        )  # fmt: skip
        status = _ask(program)
        return subprocess.CompletedProcess(
            [function, *arguments], status, output.read_text(), errors.read_text()
        )


def _ask(program: Program) -> int:
    server = _server(program)
    assert server.stdin
    assert server.stdout
    server.stdin.write(f"{program.model_dump_json()}\n")
    server.stdin.flush()
    return int(server.stdout.readline())


_servers: "list[subprocess.Popen[str]]" = []


def _server(first: Program) -> "subprocess.Popen[str]":
    """Started in the environment of the first program: ours may have what tests left there."""
    if not _servers:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            env=first.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(server.kill)
        _servers.append(server)
    return _servers[0]


def main() -> None:
    """Fork a program for each line of standard input; answer with its exit status."""
    _load()
    for line in sys.stdin:
        program = Program.model_validate_json(line)
        child = os.fork()
        if child == 0:
            _run(program)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _load() -> None:
    for name in ("flows.cli", "flows.watch", "flows.backfill", "mlflow.transformers"):
        importlib.import_module(name)
    load_transformers()


class _Fork:
    """A fork of this process that runs job_forkserver.py, where jobs.py has a Popen of it."""

    def __init__(self, errors: int) -> None:
        requests, asking = os.pipe()
        answering, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for target, source in enumerate((requests, answers, errors)):
                os.dup2(source, target)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            try:
                job_forkserver.main()
            finally:  # whatever happens, this is not the program
                os._exit(0)
        os.close(requests)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(asking, "w"), os.fdopen(answering)
        self.returncode: int | None = None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int | None:
        return self.poll(0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class _JobServer(jobs._ForkServer):
    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = _Fork(self._errors.fileno())  # type: ignore[assignment]


def _run(program: Program) -> NoReturn:
    """To its end, which is any process's but that modules are not torn down: that takes seconds."""
    status = 0
    try:
        _become(program)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else bool(ended.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _become(program: Program) -> None:
    if end_with_parent is not None:
        end_with_parent()
    jobs._idle.append(_JobServer())  # now, since a process with threads should not be forked
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, path in ((1, program.output), (2, program.errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), target)
    os.chdir(program.folder)
    os.environ.clear()
    os.environ.update(program.environment)
    sys.argv = [program.function, *program.arguments]
    module, _, name = program.function.partition(":")
    getattr(importlib.import_module(module), name)()


if __name__ == "__main__":
    main()
