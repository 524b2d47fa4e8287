"""Scoring by workers: each checkpoint becomes a run of the ``score`` deployment.

Of a backlog several become one run, since to start a run takes longer than to score a small model.

    watch                     cache/handed/KEY/               a worker with a GPU
    request  ------------->   request.json   ------------->   the scoring job
    records, plan, fuse  <--  answer.json    <-------------   scores go to records/

Only who computes differs from a service in one process: what is asked, what is recorded of it and
in which order is the same. An answer that was not fetched, because a watch was killed, is found by
the next one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from ckptfuse.devices import visible_gpus
from ckptfuse.digests import digest
from ckptfuse.errors import MissingFile
from ckptfuse.jobs import Here, ModelScores
from ckptfuse.protocol import CheckpointModel, Event, Failed, MergeModel, Model, Request
from ckptfuse.store import FolderStore, remove_folder
from tasks.deployments import Attempts, Piece, hand_over
from tasks.log import log

#: The flow of the deployment; its name is the trajectory's.
SCORE = "score"
#: A backlog, and how many of its checkpoints share a run. Counted from the oldest: those that
#: come while it is worked off change nothing of what was handed over before.
BACKLOG, TOGETHER = 16, 8
_PAUSE = 1.0  # seconds between two looks whether another run has ended
_ANSWER: TypeAdapter[list[ModelScores]] = TypeAdapter(list[ModelScores])


class Handed:
    """What was handed over and what came back, in the workspace that all machines share."""

    def __init__(self, cache: Path) -> None:
        self.store = FolderStore(cache / "handed")
        self.store.root.mkdir(exist_ok=True)

    def ask(self, key: str, request: Request) -> None:
        self.store.write(f"{key}/request.json", request.model_dump_json().encode())

    def asked(self, key: str) -> Request:
        """Raises MissingFile when nobody asks this any more."""
        return Request.model_validate_json(self.store.read(f"{key}/request.json"))

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Be the one run that is at this, once no other is.

        A server that was down for minutes takes runs for dead that are at work, and the same is
        handed over again. The lock is the kernel's: a run that was killed holds none.
        """
        lock = FileLock(self.store.root / key / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another run is at this still; what it finds is waited for")
            lock.acquire(poll_interval=_PAUSE)
        try:
            yield
            # Whoever waits for it finds an answer, and forgets the question.
            (self.store.root / key / "lock").unlink(missing_ok=True)
        finally:
            lock.release()

    def give(self, key: str, answer: list[ModelScores]) -> None:
        self.store.write(f"{key}/answer.json", _ANSWER.dump_json(answer))

    def answer(self, key: str) -> list[ModelScores] | None:
        try:
            return _ANSWER.validate_json(self.store.read(f"{key}/answer.json"))
        except MissingFile:
            return None

    def forget(self, keys: Sequence[str]) -> None:
        """Drop questions with their answers, but not how often they were asked."""
        for key in keys:
            self.store.delete(f"{key}/answer.json")
            self.store.delete(f"{key}/request.json")
            if not self.store.list(f"{key}/"):
                remove_folder(self.store.root / key)


@dataclass(frozen=True, slots=True)
class Workers:
    """Runs requests as runs of a deployment: one for each checkpoint, fewer of a backlog.

    Merges in memory, which a rule asks for and the gate needs, are scored by whoever asks if that
    machine has the device; otherwise they are handed over too, together, to read the window once.
    """

    trajectory: str
    cache: Path

    def prepare(self) -> None:
        """Nothing to prepare here."""

    def run(
        self,
        request: Request,
        gpus_per_job: int,
        *,
        progress: Callable[[Event], None] = lambda event: None,
    ) -> list[ModelScores]:
        are_checkpoints = all(isinstance(model, CheckpointModel) for model in request.models)
        if not are_checkpoints and _has_device(request):
            return Here().run(request, gpus_per_job, progress=progress)
        size = 1 if len(request.models) <= BACKLOG else TOGETHER
        parts = batched(request.models, size) if are_checkpoints else [request.models]
        requests = [request.model_copy(update={"models": part}) for part in parts]
        return self._hand_over({digest(one.model_dump(mode="json")): one for one in requests})

    def _hand_over(self, requests: dict[str, Request]) -> list[ModelScores]:
        handed = Handed(self.cache)
        for key, request in requests.items():
            handed.ask(key, request)
        pieces = [
            Piece(key, f"score {names_of(request)}", {"request": key})
            for key, request in requests.items()
            if handed.answer(key) is None
        ]
        deployment = f"{SCORE}/{self.trajectory}"
        failures = hand_over(deployment, pieces, Attempts(handed.store)) if pieces else {}
        answers = {key: handed.answer(key) for key in requests}
        handed.forget(list(requests))
        return [
            one
            for key, answer in answers.items()
            for one in answer or _failed(requests[key], failures.get(key, "it left no answer"))
        ]


def _failed(request: Request, reason: str) -> list[ModelScores]:
    told = f"its score run failed: {reason}"
    return [
        ModelScores(failed=Failed(model=index, error="other", reason=told))
        for index in range(len(request.models))
    ]


def batched(models: Sequence[Model], size: int) -> Iterator[tuple[Model, ...]]:
    for start in range(0, len(models), size):
        yield tuple(models[start : start + size])


def _has_device(request: Request) -> bool:
    return request.numerics.device_class == "cpu" or bool(visible_gpus())


def names_of(request: Request) -> str:
    """What is scored, for people: checkpoints by name, merges by their window's newest."""
    uris = []
    for model in request.models:
        source = model.ancillary if isinstance(model, MergeModel) else model.input
        uris.append(source.uri.rstrip("/").rpartition("/")[2])
    kind = "merges at " if any(isinstance(m, MergeModel) for m in request.models) else ""
    names = list(dict.fromkeys(uris))
    return kind + (names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})")
