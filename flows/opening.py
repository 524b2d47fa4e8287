"""How a flow opens its trajectory: with what its machine and its parameters allow."""

import logging
from pathlib import Path

from ckptfuse.params import load_params
from ckptfuse.service import Service, open_service
from flows.environment import prepare
from tasks.log import log
from tasks.workers import Workers


def open_flow(params_file: str) -> Service:
    """The service; its scoring goes to workers where ``execution`` says so."""
    params = load_params(Path(params_file))
    prepare(Path(params.workspace))  # a worker of Prefect's has not been through our command line
    log.setLevel(logging.INFO)  # Prefect gives an extra logger its handlers, and no level
    if params.execution == "inline":
        return open_service(params)
    return open_service(params, Workers(params.trajectory, Path(params.workspace) / "cache"))
