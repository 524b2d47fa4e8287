"""The commands on published fusions: which is champion, which stay, is all as it was?"""

import getpass
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptfuse.errors import CkptfuseError, ConfigurationError
from flows.commands.console import stderr, stdout
from flows.commands.service import ParamsOption, load, log_to_stderr

if TYPE_CHECKING:
    from ckptfuse.service import Service

Name = Annotated[
    str | None,
    typer.Argument(metavar="STEP|VERSION|FUSION|TAG", help="v3 is a version; 3 a step or one"),
]
#: States of links that do not prove the chain, and what is said of them.
_FAULTS = {"broken": "the chain is broken at", "unchecked": "out of reach, so unproved, is"}
Reason = Annotated[str, typer.Option(help="Why, for the record.")]


def promote(
    name: Name = None, reason: Reason = "promoted by hand", params: ParamsOption = None
) -> None:
    """Make a published fusion the champion: without a name, the newest."""
    with _writing(params) as service:
        from ckptfuse.published import find_publication, publications
        from tasks.aliases import promote as promote_by_hand

        known = publications(service)
        if name is None and not known:
            raise ConfigurationError("nothing was published yet")
        chosen = known[-1] if name is None else find_publication(service, name)
        record = promote_by_hand(service, chosen, by=_who(), reason=reason)
    stdout.print(
        f"champion: version {chosen.version} ({chosen.tag}), decision {record.number}: "
        f"{record.reason}",
        markup=False,
    )


def rollback(reason: Reason = "rolled back by hand", params: ParamsOption = None) -> None:
    """Return to the champion before the present one."""
    with _writing(params) as service:
        from ckptfuse.published import find_publication
        from tasks.aliases import rollback as rollback_by_hand

        record = rollback_by_hand(service, by=_who(), reason=reason)
        chosen = find_publication(service, record.fusion)
    stdout.print(
        f"champion: version {chosen.version} ({chosen.tag}), decision {record.number}, takes back "
        f"{record.undoes}: {record.reason}",
        markup=False,
    )


def verify(
    name: Name = None,
    params: ParamsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove a version's chain down to its checkpoints: without a name, the champion's."""
    service = _open(params)
    from ckptfuse.promotion import champion
    from tasks.chain import Link
    from tasks.chain import verify as links_of

    present = champion(service)
    if name is None and present is None:
        raise ConfigurationError("there is no champion yet; name a version")
    links: list[Link] = []
    for link in links_of(service, name or present.fusion):  # type: ignore[union-attr]
        links.append(link)
        if not as_json:
            stdout.print(f"{link.state:9}  {link.name}: {link.said}", markup=False)
    faults = [link for link in links if link.state in _FAULTS]
    if as_json:
        print(json.dumps({"holds": not faults, "links": [asdict(x) for x in links]}, indent=2))
    for link in faults:
        told = _FAULTS[link.state]
        stderr.print(f"ckptfuse: {told} {link.name}: {link.said}", markup=False)
    if faults:
        raise typer.Exit(1)


def prune(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would go and what would stay.")
    ] = False,
    params: ParamsOption = None,
) -> None:
    """Delete what params.yaml's retention does not keep; `watch` does so too."""
    if dry_run:
        _foretell(_open(params))
        return
    freed = 0
    with _writing(params) as service:
        from tasks import retention

        for item in chain(retention.prune_copies(service), retention.prune_published(service)):
            freed += item.freed
            stdout.print(f"deleted {item.name}: {item.reason}", markup=False)
    stdout.print(f"{freed / 1e6:.1f} MB freed", markup=False)


def _foretell(service: "Service") -> None:
    from tasks import retention

    seen = retention.outlook(service)
    for record, reason in seen.kept:
        stdout.print(f"stays  version {record.version} ({record.tag}): {reason}", markup=False)
    for record in seen.going:
        stdout.print(f"goes   version {record.version} ({record.tag})", markup=False)
    for item in seen.stale:
        stdout.print(
            f"goes   the workspace's copy of {item.fusion[:12]}: {item.reason}", markup=False
        )
    if seen.holding.checkpoints:
        stdout.print(
            f"held   {seen.holding.checkpoints} checkpoints that fusions were made of, "
            f"{seen.holding.bytes / 1e6:.1f} MB",
            markup=False,
        )
    stdout.print(f"{seen.freed / 1e6:.1f} MB would be freed", markup=False)


def _open(params: Path | None) -> "Service":
    loaded, _ = load(params)
    from ckptfuse.service import open_service

    return open_service(loaded)


@contextmanager
def _writing(params: Path | None) -> Iterator["Service"]:
    """The service, as its one writer."""
    service = _open(params)
    log_to_stderr()
    with service.workspace.lock() as mine:
        if not mine:
            raise CkptfuseError("another process is at work on this workspace; try again later")
        yield service


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under an id without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
