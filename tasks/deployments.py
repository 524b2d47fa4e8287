"""Work that is handed to deployments, for whichever worker is free, and waited for.

Each piece is a flow run of its own. It is named by what is asked (``key``), so that a watch that
was killed and started again finds the runs of the one before and waits for those. A run that ended
without its result is followed by another attempt: the number is in the idempotency key, since the
server answers a key that it knows with the earlier run, even one that crashed.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from ckptfuse.errors import ConfigurationError, MissingFile
from ckptfuse.store import FolderStore
from tasks.log import log
from tasks.showing import Progress

#: The server's limit on GPUs at work, on all machines; `ckptfuse deploy` puts it there.
GPUS = "ckptfuse-gpus"
#: Runs of one piece that a caller tries; those of callers before it do not count.
ATTEMPTS = 3
_PAUSE = 1.0  # seconds between two looks at the runs
_QUIET = 60.0  # seconds after which a wait is told of again
_PAGE = 200  # runs that the server tells of at once


@dataclass(frozen=True, slots=True)
class Piece:
    """One flow run's worth of work: a digest of what is asked, and a name for people."""

    key: str
    name: str
    parameters: Mapping[str, str | int]


def hand_over(deployment: str, pieces: Sequence[Piece], attempts: "Attempts") -> dict[str, str]:
    """Have each piece carried out and wait until all have ended; key -> why, of those in vain.

    A run that crashed or was cancelled says nothing of the work itself: it is tried again. Raises
    ConfigurationError when the server has no such deployment.
    """
    failures: dict[str, str] = {}
    tries = {piece.key: 1 for piece in pieces}
    progress = Progress(f"{len(pieces)} runs of {deployment}")
    with get_client(sync_client=True) as client:
        running = {_start(deployment, piece, attempts).id: piece for piece in pieces}
        told = time.monotonic()
        while running:
            time.sleep(_PAUSE)
            waiting = 0
            for run_id, run in _read(client, running):
                if run is not None and not (run.state and run.state.is_final()):
                    waiting += run.state_type in (None, StateType.SCHEDULED)
                    continue
                piece = running.pop(run_id)
                problem = _problem(run)
                if problem is None:
                    log.info("%s is done (%s)", piece.name, run.name if run else "")
                elif _is_no_answer(run) and tries[piece.key] < ATTEMPTS:
                    tries[piece.key] += 1
                    log.warning("%s is tried again: %s", piece.name, problem)
                    running[_start(deployment, piece, attempts).id] = piece
                else:
                    failures[piece.key] = problem
            progress.update(1 - len(running) / len(pieces))
            if running and time.monotonic() - told > _QUIET:
                told = time.monotonic()
                log.info(
                    "%s: %d of %d runs have not ended, %d of them wait for a worker",
                    deployment, len(running), len(pieces), waiting,
                )  # fmt: skip
    return failures


def _start(deployment: str, piece: Piece, attempts: "Attempts") -> FlowRun:
    """The piece's run that has not ended; a new attempt where there is none."""
    attempt = attempts.of(piece.key)
    while True:
        suffix = f", attempt {attempt}" if attempt > 1 else ""
        try:
            run: FlowRun = run_deployment(  # type: ignore[assignment]  # a coroutine in async code alone
                deployment,
                parameters=dict(piece.parameters),
                flow_run_name=f"{piece.name}{suffix}",
                idempotency_key=f"{piece.key}-{attempt}",
                timeout=0,
            )
        except ObjectNotFound as error:
            raise ConfigurationError(
                f"Prefect's server has no deployment {deployment}, which execution: deployments "
                "needs; `ckptfuse deploy` puts it there"
            ) from error
        if not (run.state and run.state.is_final()):
            return run
        attempt += 1
        attempts.remember(piece.key, attempt)


def _read(
    client: SyncPrefectClient, running: Iterable[UUID]
) -> Iterator[tuple[UUID, FlowRun | None]]:
    """Each run as it is now; None for one that somebody deleted."""
    wanted = list(running)
    for start in range(0, len(wanted), _PAGE):
        page = wanted[start : start + _PAGE]
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=page))
        found = {run.id: run for run in client.read_flow_runs(flow_run_filter=chosen)}
        yield from ((run_id, found.get(run_id)) for run_id in page)


def _is_no_answer(run: FlowRun | None) -> bool:
    return run is None or run.state_type in (StateType.CRASHED, StateType.CANCELLED)


def _problem(run: FlowRun | None) -> str | None:
    if run is None:
        return "its run was deleted"
    if run.state_type == StateType.COMPLETED:
        return None
    state = run.state
    return (
        f"run {run.name!r} is {state.name if state else 'lost'}: {state.message if state else ''}"
    )


class Attempts:
    """The number of each piece's present attempt. Forgotten, it is found again from 1."""

    def __init__(self, store: FolderStore) -> None:
        self._store = store

    def of(self, key: str) -> int:
        try:
            return int(self._store.read(f"{key}/attempt"))
        except (MissingFile, ValueError):
            return 1

    def remember(self, key: str, attempt: int) -> None:
        self._store.write(f"{key}/attempt", str(attempt).encode())
