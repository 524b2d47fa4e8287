"""Prefect's server: does it answer, is it of our version, is the trajectory deployed on it?"""

import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from packaging.version import Version
from prefect import __version__
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from ckptfuse.checks import Check, failed, ok, warning
from ckptfuse.checks.clock import compare_clocks

SERVER, CLOCK, DEPLOYED, LIMIT = (
    "Prefect server",
    "clock of Prefect",
    "deployments",
    "limit on GPUs",
)
_TIMEOUT = 30.0
_DEPLOY = "put it there: ckptfuse deploy"


def prefect(trajectory: str, limit: str) -> Iterator[Check]:
    """``limit``: the name of the global concurrency limit that scoring jobs hold."""
    url = get_current_settings().api.url
    if url is None:
        yield ok(SERVER, "none is named (PREFECT_API_URL): each run starts one of its own")
        return
    asked = time.time()
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=_TIMEOUT) as answer:  # noqa: S310 - the team's own
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # it may ask who we are, and answers all the same
        date = error.headers["Date"]
    except OSError as error:
        yield failed(
            SERVER,
            f"{url} does not answer ({error})",
            "start it (prefect server start), or correct PREFECT_API_URL",
        )
        return
    answered = time.time()
    yield compare_clocks(CLOCK, date, asked=asked, answered=answered)
    try:
        with get_client(sync_client=True) as client:
            yield _version(url, client.api_version())
            yield from _deployed(client, trajectory, limit)
    except Exception as error:  # httpx's, Prefect's, and RuntimeError for other major versions
        yield failed(
            SERVER,
            f"{url}: {type(error).__name__}: {error}",
            f"run a server of version {__version__}; where it asks who we are, set "
            "PREFECT_API_AUTH_STRING",
        )


def _version(url: str, found: str) -> Check:
    server, ours = Version(found), Version(__version__)
    said = f"{url} answers; server {server}, client {ours}"
    if server.major != ours.major:
        return failed(SERVER, said, f"run a server of version {ours}")
    if server < ours:
        return warning(SERVER, said, f"bring the server to {ours}: an older one may not serve us")
    return ok(SERVER, said)


def _deployed(client: SyncPrefectClient, trajectory: str, limit: str) -> Iterator[Check]:
    """Is there a deployment that looks, one that scores, and a worker for each?"""
    name = f"watch/{trajectory}"
    try:
        watch = client.read_deployment_by_name(name)
    except ObjectNotFound:
        said = f"the server has no {name}: only `ckptfuse watch` looks at the bucket"
        yield warning(DEPLOYED, said, _DEPLOY)
        return
    if watch.paused or not any(schedule.active for schedule in watch.schedules):
        mend = f"prefect deployment schedule resume {name}, or prefect deployment resume {name}"
        yield warning(DEPLOYED, f"{name} has no schedule at work", mend)
        return
    pools = {watch.work_pool_name}
    try:
        pools.add(client.read_deployment_by_name(f"score/{trajectory}").work_pool_name)
    except ObjectNotFound:
        pass
    else:
        yield _limit(client, limit)
    idle = [pool for pool in sorted(filter(None, pools)) if not _is_ready(client, pool)]
    if idle:
        names = ", ".join(idle)
        mend = "; ".join(f"prefect worker start --pool {pool}" for pool in idle)
        yield warning(DEPLOYED, f"no worker serves {names}: runs of {trajectory} wait", mend)
    else:
        yield ok(DEPLOYED, f"{name} is on a schedule, and workers serve its pools")


def _is_ready(client: SyncPrefectClient, pool: str) -> bool:
    found: WorkPool = client.read_work_pool(pool)
    return found.status is not None and found.status.name == "READY"


def _limit(client: SyncPrefectClient, name: str) -> Check:
    try:
        found = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        return failed(LIMIT, f"{name} is not on the server: no score run can start", _DEPLOY)
    if not found.active or not found.limit:
        mend = f"prefect gcl update {name} --enable --limit N"
        return failed(LIMIT, f"{name} lets no job run", mend)
    return ok(LIMIT, f"{name} lets {found.limit} GPUs work at once")
