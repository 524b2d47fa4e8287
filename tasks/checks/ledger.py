"""The ledger's programs and remotes: Git, DVC, and where they push to."""

import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from packaging.version import Version

from ckptfuse.checks import Check, failed, ok, warning
from ckptfuse.checks.check import carried_out
from ckptfuse.checks.probe import written
from ckptfuse.errors import PublicationError
from ckptfuse.published import publications
from ckptfuse.service import Service
from tasks.ledger import Ledger
from tasks.version import ledger_of

GIT, DVC, GIT_REMOTE, DVC_REMOTE = "Git", "DVC", "Git remote", "DVC remote"
PUSHED = "tags of the Git remote"
#: git init --initial-branch
OLDEST_GIT = Version("2.28")
_PATIENCE = 30.0  # seconds: a person waits
_GIT_MEND = (
    "correct ledger.remote, or give this user a key or a credential helper that may push, and "
    "that asks nobody"
)
_DVC_MEND = (
    "pip install -c constraints.txt of the project brings what DVC needs; where it may not write, "
    "name another folder in DVC_SITE_CACHE_DIR"
)


def ledger(service: Service) -> Iterator[Check]:
    yield _git()
    takes = carried_out(GIT_REMOTE, lambda: _git_remote(service), _GIT_MEND)
    yield takes
    tags = [record.tag for record in publications(service)]
    if tags and takes.state == "ok" and service.params.ledger.remote is not None:
        yield carried_out(PUSHED, lambda: _pushed(service, tags), _GIT_MEND)
    yield carried_out(DVC, _dvc, _DVC_MEND)
    yield _dvc_remote(service.params.ledger.dvc_remote)


def _git() -> Check:
    if shutil.which("git") is None:
        return failed(GIT, "there is no git", "apt-get install git")
    said = subprocess.run(["git", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    if found is None or Version(found[0]) < OLDEST_GIT:
        mend = f"install {OLDEST_GIT} or newer"
        return failed(GIT, f"{said.strip()} is too old for the ledger", mend)
    return ok(GIT, said.strip())


def _git_remote(service: Service) -> Check:
    """A push as the ledger does it, which the remote answers and which changes nothing there."""
    remote = service.params.ledger.remote
    if remote is None:
        return ok(GIT_REMOTE, "none is set (ledger.remote): commits and tags stay in the workspace")
    try:
        with _to_push(ledger_of(service).folder) as (ledger, pushed):
            ledger.git("push", "--dry-run", "--quiet", "--", remote, pushed)
    except PublicationError as error:
        rejected = "another workspace has pushed there: give this one a ledger.remote of its own"
        return failed(GIT_REMOTE, str(error), rejected if "[rejected]" in str(error) else _GIT_MEND)
    return ok(GIT_REMOTE, f"{remote} would take a push; its hooks and rules are not asked")


@contextmanager
def _to_push(folder: Path) -> Iterator[tuple[Ledger, str]]:
    """The ledger and its branch; where there is none yet, an empty commit under a name of ours."""
    ledger = Ledger(folder, patience=_PATIENCE)
    if ledger.is_there:
        yield ledger, "main"
        return
    with tempfile.TemporaryDirectory() as temporary:
        probe = Ledger(Path(temporary), patience=_PATIENCE)
        probe.git("init", "--quiet", "--initial-branch=main")
        probe.git("commit", "--quiet", "--allow-empty", "--message", "probe")
        yield probe, f"main:refs/heads/ckptfuse-doctor-{uuid.uuid4().hex}"


def _pushed(service: Service, tags: Sequence[str]) -> Check:
    """Has the remote the tags of all that was published?"""
    with _to_push(ledger_of(service).folder) as (ledger, _):
        told = ledger.git("ls-remote", "--tags", "--", str(service.params.ledger.remote))
    there = {line.rpartition("refs/tags/")[2] for line in told.splitlines()}
    lost = [tag for tag in tags if tag not in there]
    if not lost:
        return ok(PUSHED, f"all {len(tags)} that the records name are there")
    said = f"{len(lost)} of {len(tags)} are not there, last of them {lost[-1]}"
    return warning(PUSHED, said, "the next publication pushes all that the ledger has")


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
