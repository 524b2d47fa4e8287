"""The commands that tell how the service is: is all there that it needs, and what has it done?"""

import json
import threading
from dataclasses import asdict
from typing import Annotated

import typer

from ckptfuse.errors import CkptfuseError
from flows.commands.console import stderr, stdout
from flows.commands.service import ParamsOption, load

#: Where Prometheus finds a trajectory, unless told otherwise (infra/prometheus).
PORT = 9469


def doctor(
    params: ParamsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check all that the service needs, and tell how to mend what it lacks."""
    loaded, _ = load(params)
    from tasks.checks.all import checks

    found = []
    for check in checks(loaded):
        found.append(check)
        if not as_json:
            stdout.print(f"{check.state:8} {check.name}: {check.said}", markup=False)
            if check.mend:
                stdout.print(f"{'':8}   {check.mend}", markup=False)
    failures = [check.name for check in found if check.state == "failed"]
    if as_json:
        told = {"healthy": not failures, "checks": [asdict(check) for check in found]}
        print(json.dumps(told, indent=2))
    if failures:
        stderr.print(f"ckptfuse: {len(failures)} checks failed: {', '.join(failures)}")
        raise typer.Exit(1)


def metrics(
    params: ParamsOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Serve /metrics here.")] = PORT,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    once: Annotated[bool, typer.Option("--once", help="Print them and end.")] = False,
) -> None:
    """Serve what Prometheus asks for: from the workspace alone, whichever server is down."""
    loaded, _ = load(params)
    from prometheus_client import generate_latest, start_http_server

    from ckptfuse.metrics import prometheus_registry
    from ckptfuse.service import open_service

    registry = prometheus_registry(open_service(loaded))
    if once:
        stdout.print(generate_latest(registry).decode(), markup=False, end="")
        return
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise CkptfuseError(
            f"cannot listen at {host}:{port} ({error}); choose another --port"
        ) from error
    stderr.print(f"metrics of {loaded.trajectory}: http://{host}:{server.server_port}/metrics")
    threading.Event().wait()
