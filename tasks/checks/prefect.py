"""Prefect's server: does it answer, is it of our version, is the trajectory deployed on it?"""

import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from packaging.version import Version
from prefect import __version__
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from ckptfuse.checks import Check, failed, ok, warning
from ckptfuse.checks.clock import compare_clocks

SERVER, CLOCK, DEPLOYED, WORKERS, LIMIT = (
    "Prefect server",
    "clock of Prefect",
    "deployments",
    "workers",
    "limit on GPUs",
)
_TIMEOUT = 30.0
_DEPLOY = "put it there: ckptfuse deploy"


def prefect(trajectory: str, limit: str, *, hands_over: bool) -> Iterator[Check]:
    """``limit``: the name of the global concurrency limit that scoring jobs hold.

    ``hands_over``: scoring goes to the deployment for it (execution: deployments).
    """
    url = get_current_settings().api.url
    if url is None and hands_over:
        yield failed(
            SERVER,
            "none is named (PREFECT_API_URL), and execution: deployments needs one",
            "set PREFECT_API_URL, or execution: inline",
        )
        return
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
            yield from _deployed(client, trajectory, limit, hands_over=hands_over)
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


def _deployed(
    client: SyncPrefectClient, trajectory: str, limit: str, *, hands_over: bool
) -> Iterator[Check]:
    """Is there a deployment that looks, one that scores, and a worker for each?"""
    watch = _deployment(client, f"watch/{trajectory}")
    score = _deployment(client, f"score/{trajectory}")
    if score is None and hands_over:
        said = f"the server has no score/{trajectory}: no look can score (execution: deployments)"
        yield failed(DEPLOYED, said, _DEPLOY)
    else:
        yield _scheduled(watch, f"watch/{trajectory}")
    if score is not None:
        yield _limit(client, limit)
    pools = {found.work_pool_name for found in (watch, score) if found is not None}
    if any(pools):
        yield _served(client, sorted(filter(None, pools)), trajectory)


def _deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def _scheduled(watch: DeploymentResponse | None, name: str) -> Check:
    if watch is None:
        said = f"the server has no {name}: only `ckptfuse watch` looks at the bucket"
        return warning(DEPLOYED, said, _DEPLOY)
    if watch.paused or not any(schedule.active for schedule in watch.schedules):
        mend = f"prefect deployment schedule resume {name}, or prefect deployment resume {name}"
        return warning(DEPLOYED, f"{name} has no schedule at work", mend)
    return ok(DEPLOYED, f"{name} is on a schedule")


def _served(client: SyncPrefectClient, names: Sequence[str], trajectory: str) -> Check:
    """A paused pool gives its workers nothing."""
    pools = [client.read_work_pool(name) for name in names]
    paused = [pool.name for pool in pools if pool.is_paused]
    idle = [pool.name for pool in pools if not (pool.is_paused or _is_ready(pool))]
    said = [f"{name} is paused" for name in paused] + [f"no worker serves {name}" for name in idle]
    if not said:
        return ok(WORKERS, f"they serve {', '.join(names)}")
    mend = [f"prefect work-pool resume {name}" for name in paused]
    mend += [f"prefect worker start --pool {name}" for name in idle]
    return warning(WORKERS, f"{', '.join(said)}: runs of {trajectory} wait", "; ".join(mend))


def _is_ready(pool: WorkPool) -> bool:
    return pool.status is not None and pool.status.name == "READY"


def _limit(client: SyncPrefectClient, name: str) -> Check:
    try:
        found = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        return failed(LIMIT, f"{name} is not on the server: no score run can start", _DEPLOY)
    if not found.active or not found.limit:
        mend = f"prefect gcl update {name} --enable --limit N"
        return failed(LIMIT, f"{name} lets no job run", mend)
    return ok(LIMIT, f"{name} lets {found.limit} GPUs work at once")
