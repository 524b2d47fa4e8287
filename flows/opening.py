"""How a flow opens its trajectory: with what its machine and its parameters allow."""

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from prefect.runtime import deployment
from prefect.settings import PREFECT_API_URL

from ckptfuse.jobs import Here, Runner
from ckptfuse.params_loading import load_params
from ckptfuse.service import Service, open_service
from flows.environment import prepare
from tasks.ahead import ImportingAhead
from tasks.log import log
from tasks.workers import Workers


def open_flow(params_file: str) -> Service:
    """The service; its scoring goes to workers where ``execution`` says so."""
    if deployment.id is not None:  # a worker of Prefect's starts it elsewhere (infra/prefect.yaml)
        os.chdir(Path(params_file).parent)
    params = load_params(Path(params_file))
    prepare(Path(params.workspace))  # a worker of Prefect's has not been through our command line
    _leave_imports_alone()
    log.setLevel(logging.INFO)  # Prefect gives an extra logger its handlers, and no level
    runner: Runner = Here()
    if params.execution == "deployments":
        runner = Workers(params.trajectory, Path(params.workspace) / "cache")
    return open_service(params, ImportingAhead(runner))


def start_server() -> None:
    """Start the embedded server, where one is needed; again, where it was killed.

    Prefect would start it by itself, with the modules of this folder before Python's, and not look
    after it. It keeps its address, if that is free, which what Prefect has running in this process
    goes on using.
    """
    if PREFECT_API_URL.value():
        return
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    if server.server_process is not None and server.server_process.poll() is not None:
        log.warning("Prefect's embedded server was gone; it is started again")
        server.running = False
    with _safe_path():
        server.start()


@contextmanager
def _safe_path() -> Iterator[None]:
    """For Python programs of ours; those of the team's do import what lies beside them."""
    given = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = given or "1"
    try:
        yield
    finally:
        if not given:
            del os.environ["PYTHONSAFEPATH"]


@cache
def _leave_imports_alone() -> None:
    """Garbage collection walks what Prefect brings in over and over while records are read."""
    gc.freeze()
