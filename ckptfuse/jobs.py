"""The parent's side of scoring jobs: start one, listen to it, and never leave one behind.

Loading torch and transformers takes a job longer than scoring a small model does. So jobs are
forked from a process that has both loaded (job_forkserver.py), started with the first job and
kept for the next ones::

    this process --request--> fork server --fork--> job --JSON lines--> this process
                                   |                 '-- ends, its memory returns
                                   '-- ends when this process does, however that happens
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Protocol

from pydantic import TypeAdapter, ValidationError

from ckptfuse.devices import claim, slots
from ckptfuse.errors import JobError
from ckptfuse.job_forkserver import Ended, Job
from ckptfuse.processes import last_words
from ckptfuse.protocol import Event, Failed, Read, Request, Scored

#: Jobs of one model each that die until no more are started, if none of the request's lived.
ENOUGH = 3
_NOT_TRIED = f"not tried, as {ENOUGH} others died: "

_SAID: TypeAdapter[Event | Ended] = TypeAdapter(Event | Ended)


@dataclass(frozen=True)
class ModelScores:
    """What a job said of one model of its request; ``seconds`` it took, failing included."""

    fingerprint: str | None = None
    architecture: str | None = None
    scored: Scored | None = None
    failed: Failed | None = None
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        return self.scored is not None or self.failed is not None


class Runner(Protocol):
    """Who carries out what a scorer asks: this machine, or others in its name."""

    def prepare(self) -> None:
        """Get ready while the caller still prepares its request."""

    def run(
        self, request: Request, gpus_per_job: int, *, progress: Callable[[Event], None] = ...
    ) -> list[ModelScores]:
        """One answer per model, in order. Raises JobError where no job can be run at all."""


@dataclass(frozen=True, slots=True)
class Here:
    """Jobs on this machine, on whichever of its devices are free: one for each, or so many."""

    most: int | None = None

    def prepare(self) -> None:
        prepare()

    def run(
        self,
        request: Request,
        gpus_per_job: int,
        *,
        progress: Callable[[Event], None] = lambda event: None,
    ) -> list[ModelScores]:
        wanted = slots(request.numerics.device_class, gpus_per_job)
        with claim(wanted, self.most or max(1, len(request.models))) as free:
            return run_jobs(request, free, progress=progress)


def run_jobs(
    request: Request,
    slots: Sequence[Mapping[str, str]],
    *,
    progress: Callable[[Event], None] = lambda event: None,
) -> list[ModelScores]:
    """Run a request as one job a slot (devices.py), at once; one answer per model, in order."""
    count = min(len(slots), len(request.models))
    if count <= 1:
        return run_job(request, progress=progress, environment=slots[0])

    def run_share(share: int) -> list[ModelScores]:
        def tell(event: Event) -> None:
            progress(event.model_copy(update={"model": event.model * count + share}))

        models = request.models[share::count]
        mine = request.model_copy(update={"models": models})
        return run_job(mine, progress=tell, environment=slots[share])

    with ThreadPoolExecutor(count) as pool:
        shares = [pool.submit(run_share, share) for share in range(count)]
    answers = [share.result() for share in shares]
    return [answers[index % count][index // count] for index in range(len(request.models))]


def run_job(
    request: Request,
    *,
    progress: Callable[[Event], None] = lambda event: None,
    environment: Mapping[str, str] | None = None,
) -> list[ModelScores]:
    """Run one scoring job to its end; one answer per model of the request.

    A job that dies (of memory, for one) costs no other model its answer: those that it had not
    spoken of get a job each, which holds one checkpoint at a time; one that dies again fails that
    model. When the first ``ENOUGH`` of these all do, the fault is not the models', and the rest
    fail untried. ``environment`` is added to this process's.
    """
    answers, death = _run_once(request, progress, environment)
    left = [index for index, answer in enumerate(answers) if not answer.is_complete]
    has_answers = len(left) < len(answers)
    for tried, index in enumerate(_from_both_ends(left)):
        answer = answers[index]
        if len(answers) > 1 and (has_answers or tried < ENOUGH):
            alone = request.model_copy(update={"models": request.models[index : index + 1]})

            def tell(event: Event, index: int = index) -> None:
                progress(event.model_copy(update={"model": index}))

            (again,), death = _run_once(alone, tell, environment)
            answer = replace(again, seconds=answer.seconds + again.seconds)
            has_answers = has_answers or answer.is_complete
        elif len(answers) > 1:
            death = death if death.startswith(_NOT_TRIED) else f"{_NOT_TRIED}{death}"
        if not answer.is_complete:
            failed = Failed(model=index, error="other", reason=death)
            progress(failed)
            answer = ModelScores(failed=failed, seconds=answer.seconds)
        answers[index] = answer
    return answers


def _from_both_ends(indices: Sequence[int]) -> list[int]:
    """The newest, the oldest, then the others from the newest: few neighbours say little of all."""
    newest_first = list(reversed(indices))
    return [*newest_first[:1], *newest_first[1:][-1:], *newest_first[1:-1]]


def _run_once(
    request: Request,
    progress: Callable[[Event], None],
    environment: Mapping[str, str] | None,
) -> tuple[list[ModelScores], str]:
    """What one job said of each model, and how it ended, with the end of its standard error."""
    with tempfile.TemporaryDirectory() as folder:
        path, errors = Path(folder, "request.json"), Path(folder, "stderr")
        path.write_text(request.model_dump_json())
        errors.touch()
        job = Job(
            request=str(path),
            stderr=str(errors),
            folder=str(Path.cwd()),
            environment={**os.environ, **(environment or {})},
        )
        events: list[Event] = []
        status = None
        laps = [time.monotonic()]  # its start, the answer of each model, and its end
        with _fork_server() as server:
            for said in server.run(job):
                if isinstance(said, Ended):
                    status = said.status
                else:
                    progress(said)
                    events.append(said)
                if isinstance(said, Scored | Failed | Ended):
                    laps.append(time.monotonic())
        # Models are answered in order, so a job that died was at the first without an answer.
        took = [after - before for before, after in pairwise(laps)]
        answers = [
            replace(_answer(index, events), seconds=took[index] if index < len(took) else 0.0)
            for index in range(len(request.models))
        ]
        tail = last_words(errors)
    killed = " (out of memory?)" if status == -signal.SIGKILL else ""
    return answers, f"the scoring job ended with status {status}{killed}: {tail}".removesuffix(": ")


def _answer(index: int, events: Sequence[Event]) -> ModelScores:
    mine = [event for event in events if event.model == index]
    read = next((event for event in mine if isinstance(event, Read)), None)
    return ModelScores(
        fingerprint=read.fingerprint if read else None,
        architecture=read.architecture if read else None,
        scored=next((event for event in mine if isinstance(event, Scored)), None),
        failed=next((event for event in mine if isinstance(event, Failed)), None),
    )


class _ForkServer:
    """A running job_forkserver.py. It ends when its standard input does."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ckptfuse.job_forkserver"],  # no module of this folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def run(self, job: Job) -> Iterator[Event | Ended]:
        """What the job says, and at last how it ended."""
        lines, requests = self._pipes()
        try:
            requests.write(job.model_dump_json() + "\n")
            requests.flush()
        except BrokenPipeError:
            raise self._died() from None
        for line in lines:
            try:
                said = _SAID.validate_json(line)
            except ValidationError:  # a line that the job died in
                continue
            yield said
            if isinstance(said, Ended):
                return
        raise self._died()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        return self._process.stdout, self._process.stdin

    def _died(self) -> JobError:
        status = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace")[-2000:]
        return JobError(f"the process that starts scoring jobs ended with status {status}:\n{tail}")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End it and the job that it runs."""
        self._process.kill()
        self._process.wait()
        for pipe in (*self._pipes(), self._errors):
            pipe.close()


_idle: list[_ForkServer] = []
_idle_lock = threading.Lock()
# A fork of this process shares our pipes: it must not send its requests into them.
os.register_at_fork(after_in_child=_idle.clear)


def prepare() -> None:
    """Let a fork server load while this process does something else."""
    with _idle_lock:
        if not any(server.is_alive() for server in _idle):
            _idle.append(_ForkServer())


@contextmanager
def _fork_server() -> Iterator[_ForkServer]:
    """A fork server to ourselves; kept for the next job unless this one was broken off."""
    server = _idle_server() or _ForkServer()
    try:
        yield server
    except BaseException:
        server.kill()
        raise
    with _idle_lock:
        _idle.append(server)


def _idle_server() -> _ForkServer | None:
    with _idle_lock:
        while _idle:
            server = _idle.pop()
            if server.is_alive():
                return server
    return None
