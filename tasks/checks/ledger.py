"""The ledger's programs and remotes: Git, DVC, and where they push to."""

import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packaging.version import Version

from ckptfuse.checks import Check, failed, ok, warning
from ckptfuse.checks.check import carried_out
from ckptfuse.checks.probe import written
from ckptfuse.published import publications
from ckptfuse.service import Service
from tasks.ledger import Ledger
from tasks.version import ledger_of

GIT, DVC, GIT_REMOTE, DVC_REMOTE = "Git", "DVC", "Git remote", "DVC remote"
PUSHED = "tags of the Git remote"
#: git init --initial-branch
OLDEST_GIT = Version("2.28")
_TIMEOUT = 30.0
_DVC_MEND = (
    "pip install -c constraints.txt of the project brings what DVC needs; where it may not write, "
    "name another folder in DVC_SITE_CACHE_DIR"
)


def ledger(service: Service) -> Iterator[Check]:
    yield _git()
    takes = _git_remote(service)
    yield takes
    if service.params.ledger.remote is not None and takes.state == "ok":
        yield from _pushed(service, service.params.ledger.remote)
    yield carried_out(DVC, _dvc, _DVC_MEND)
    yield _dvc_remote(service.params.ledger.dvc_remote)


def _git() -> Check:
    if shutil.which("git") is None:
        return failed(GIT, "there is no git", "apt-get install git")
    said = _run(["git", "--version"]).stdout.strip()
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    if found is None or Version(found[0]) < OLDEST_GIT:
        return failed(GIT, f"{said} is too old for the ledger", f"install {OLDEST_GIT} or newer")
    return ok(GIT, said)


def _git_remote(service: Service) -> Check:
    """A push as the ledger does it, which the remote answers and which changes nothing there."""
    remote = service.params.ledger.remote
    if remote is None:
        return ok(GIT_REMOTE, "none is set (ledger.remote): commits and tags stay in the workspace")
    try:
        with _to_push(ledger_of(service)) as (repository, pushed):
            push = ["push", "--dry-run", "--quiet", "--", remote, pushed]
            done = _run(["git", "-C", str(repository), "-c", "core.hooksPath=/dev/null", *push])
    except subprocess.TimeoutExpired:
        said = f"{remote} did not answer in {_TIMEOUT:.0f} s"
        return failed(GIT_REMOTE, said, "correct ledger.remote, or let this machine reach it")
    if done.returncode == 0:
        return ok(GIT_REMOTE, f"{remote} would take a push; its hooks and rules are not asked")
    said = f"{remote}: {done.stderr.strip()}"
    if "[rejected]" in done.stderr:
        mend = "another workspace has pushed there: give this one a ledger.remote of its own"
        return failed(GIT_REMOTE, said, mend)
    mend = "correct ledger.remote, or give this user a key or a credential helper that may push"
    return failed(GIT_REMOTE, said, mend)


@contextmanager
def _to_push(ledger: Ledger) -> Iterator[tuple[Path, str]]:
    """The ledger and its branch; where there is none yet, an empty commit under a name of ours."""
    if ledger.is_there:
        yield ledger.folder, "main"
        return
    with tempfile.TemporaryDirectory() as folder:
        probe = Ledger(Path(folder))
        probe.git("init", "--quiet", "--initial-branch=main")
        probe.git("commit", "--quiet", "--allow-empty", "--message", "probe")
        yield probe.folder, f"main:refs/heads/ckptfuse-doctor-{uuid.uuid4().hex}"


def _pushed(service: Service, remote: str) -> Iterator[Check]:
    """Once something is published: has the remote its tags?"""
    tags = [record.tag for record in publications(service)]
    if not tags:
        return
    done = _run(["git", "ls-remote", "--tags", "--", remote])
    there = {line.rpartition("refs/tags/")[2] for line in done.stdout.splitlines()}
    lost = [tag for tag in tags if tag not in there]
    if not lost:
        yield ok(PUSHED, f"all {len(tags)} that the records name are there")
        return
    said = f"{len(lost)} of {len(tags)} are not there, last of them {lost[-1]}"
    yield warning(PUSHED, said, "the next publication pushes all that the ledger has")


def _dvc() -> Check:
    """Asked for its version alone, it would not open what it writes to."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Ledger(Path(folder))
        probe.git("init", "--quiet")
        probe.dvc("init")
        return ok(DVC, f"dvc {probe.dvc('--version')} can make a repository")


def _dvc_remote(url: str | None) -> Check:
    if url is None:
        said = (
            "none is set (ledger.dvc_remote): published weights stay in the ledger's own cache and "
            "in MLflow"
        )
        return ok(DVC_REMOTE, said)
    if "://" in url and not url.startswith("s3://"):
        said = f"{url} is of a kind that is not tried here"
        return warning(DVC_REMOTE, said, "see whether `dvc push`, in the ledger, works")
    mend = "correct ledger.dvc_remote, or give this user the right to write there"
    return written(DVC_REMOTE, url, mend)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        command,
        env={**environment, "GIT_TERMINAL_PROMPT": "0", "DVC_NO_ANALYTICS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT,
    )
