"""Puts on a Prefect server all that the service needs there; again, it changes what has changed.

work pools     ``ckptfuse`` and ``ckptfuse-gpu``; those that are there stay as they are
limit          on GPUs at work at once, over all machines
deployments    of infra/prefect.yaml, under the trajectory's name
automations    zombies; news, where an address for them is known
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from prefect.blocks.notifications import SlackWebhook
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

from ckptfuse.devices import visible_gpus
from ckptfuse.errors import CkptfuseError, ConfigurationError
from ckptfuse.params import Params
from flows.automations import NEWS, news, zombies
from tasks.deployments import GPUS

POOLS = ("ckptfuse", "ckptfuse-gpu")
NOTIFICATIONS = "ckptfuse"  # the block's name


def deploy(
    params: Params, params_file: Path, *, pool_type: str, gpus: int | None, notify: str | None
) -> list[str]:
    """Everything; returns a sentence on each thing that is there now.

    ``gpus``: of all workers together; None keeps the limit that is there, or counts this machine's.
    ``notify``: an Apprise URL, kept by the server as a secret; None keeps what is there.
    Raises ConfigurationError, or CkptfuseError with what Prefect says.
    """
    if gpus is not None and gpus < params.scoring.gpus_per_job:
        raise ConfigurationError(
            f"a limit of {gpus} GPUs would let no job start: scoring.gpus_per_job is "
            f"{params.scoring.gpus_per_job}"
        )
    said = asyncio.run(_prepare_server(pool_type, gpus, notify))
    _put_deployments(params, params_file)
    every = f"{params.watch.interval_seconds:g} s"
    return [*said, f"deployments of {params.trajectory}: there; it is looked at every {every}"]


async def _prepare_server(pool_type: str, gpus: int | None, notify: str | None) -> list[str]:
    async with get_client() as client:
        said = [await _put_pool(client, name, pool_type) for name in POOLS]
        said.append(await _put_limit(client, gpus))
        for automation in [zombies(), *[one async for one in _news(client, notify)]]:
            said.append(await _put_automation(client, automation))
        return said


async def _put_pool(client: PrefectClient, name: str, pool_type: str) -> str:
    try:
        found = await client.read_work_pool(name)
        return f"work pool {name}: there, of type {found.type}"
    except ObjectNotFound:
        template = await get_default_base_job_template_for_infrastructure_type(pool_type)
        if template is None:
            raise CkptfuseError(
                f"work pools of type {pool_type!r} are unknown here; `pip install "
                f"prefect-{pool_type}` beside ckptfuse, or create {name} yourself"
            ) from None
        pool = WorkPoolCreate(name=name, type=pool_type, base_job_template=template)
        await client.create_work_pool(pool)
        return f"work pool {name}: new, of type {pool_type}"


async def _put_limit(client: PrefectClient, gpus: int | None) -> str:
    if gpus is None:
        try:
            found = await client.read_global_concurrency_limit_by_name(GPUS)
            return f"limit {GPUS}: {found.limit}"
        except ObjectNotFound:
            gpus = len(visible_gpus()) or 1
    await client.upsert_global_concurrency_limit_by_name(GPUS, gpus)
    return f"limit {GPUS}: {gpus}"


async def _news(client: PrefectClient, notify: str | None) -> Any:
    """The automations that send messages, if there is somewhere to send them."""
    if notify is not None:
        # Of all blocks this one takes any of Apprise's URLs, and not only what it is named for.
        await SlackWebhook(url=notify).asave(NOTIFICATIONS, overwrite=True)  # type: ignore[arg-type]
    try:
        block = await client.read_block_document_by_name(NOTIFICATIONS, "slack-webhook")
    except ObjectNotFound:
        return
    for event in NEWS:
        yield news(event, block.id)


async def _put_automation(client: PrefectClient, automation: AutomationCore) -> str:
    found = await client.read_automations_by_name(automation.name)
    if not found:
        await client.create_automation(automation)
        return f"automation {automation.name!r}: new"
    await client.update_automation(found[0].id, automation)
    return f"automation {automation.name!r}: there"


def _put_deployments(params: Params, params_file: Path) -> None:
    """Through Prefect's own command, which reads infra/prefect.yaml."""
    text = template().read_text()
    for name, value in {
        "CKPTFUSE_TRAJECTORY": params.trajectory,
        "CKPTFUSE_HOME": os.environ.get("CKPTFUSE_HOME", str(params_file.parent)),
        "CKPTFUSE_PARAMS": params_file.name,
    }.items():
        inside_quotes = json.dumps(value)[1:-1]  # where all of them stand
        text = text.replace(f"{{{{ ${name} }}}}", inside_quotes)
    told = yaml.safe_load(text)
    for schedule in _schedules(told):
        schedule["interval"] = params.watch.interval_seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prefect.yaml")
        file.write_text(yaml.safe_dump(told, sort_keys=False))
        command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--all"]
        done = subprocess.run(
            [*command, "--prefect-file", file.name],
            cwd=folder,  # where no module of the team's is taken for one of ours
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise CkptfuseError(f"`prefect deploy` failed: {(done.stdout + done.stderr).strip()}")


def _schedules(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for deployment in told["deployments"]:
        yield from deployment.get("schedules", ())


def template() -> Path:
    """infra/prefect.yaml: a link beside this file, or its copy in an installed package."""
    return Path(__file__).with_name("prefect.yaml")
