"""The commands of a deployment: put it on a server, and tell it that there is something to see."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ckptfuse.errors import ConfigurationError
from ckptfuse.passwords import without_passwords
from flows.commands.console import stderr, stdout
from flows.commands.service import ParamsOption, check_prefect, load


def deploy(
    params: ParamsOption = None,
    pool_type: Annotated[
        str, typer.Option(help="Of work pools that are not there: process, kubernetes, ...")
    ] = "process",
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="At work at once, on all machines  [default: as it is, or here]"),
    ] = None,
    notify: Annotated[
        str | None,
        typer.Option(
            envvar="CKPTFUSE_NOTIFY_URL",
            show_envvar=True,
            help="Where news goes: a URL as Apprise knows them; kept on the server, encrypted",
        ),
    ] = None,
) -> None:
    """Put deployments, work pools, the limit on GPUs and automations on a Prefect server."""
    loaded, file = load(params)
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigurationError(
            "PREFECT_API_URL names no server to deploy to; http://127.0.0.1:4200/api is the one "
            "that `prefect server start` starts here"
        )
    check_prefect(os.environ["PREFECT_API_URL"])
    from flows.deploying import deploy as put

    # An empty variable, as a compose file leaves it, is none.
    said = put(loaded, Path(file), pool_type=pool_type, gpus=gpus, notify=notify or None)
    for line in said:
        stdout.print(line, markup=False)
    stderr.print(
        "workers: prefect worker start --pool ckptfuse --limit 1, and on each machine with GPUs "
        "prefect worker start --pool ckptfuse-gpu --limit N"
    )


def notify(
    params: ParamsOption = None,
    trajectory: Annotated[
        str | None, typer.Option(help="Instead of params.yaml's, where there is none")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="The checkpoint that was written")] = None,
) -> None:
    """Tell the service that a checkpoint was written, so that it looks now."""
    from tasks.notify import api_url, checkpoint_written

    if trajectory is None:
        from ckptfuse.params_loading import load_params

        trajectory = load_params(params).trajectory
    checkpoint_written(trajectory, uri=uri)
    told = without_passwords(api_url())
    stderr.print(f"{told} was told of {uri or 'a checkpoint'} of {trajectory}", markup=False)
