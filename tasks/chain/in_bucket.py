"""The last links: the checkpoints that were merged, where they still are."""

from pathlib import Path

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import IncompleteCheckpoint, MissingFile
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.records import Member
from ckptfuse.service import Service
from ckptfuse.store import is_s3
from tasks.chain.evidence import Broken, Gone


def source_fits(service: Service, member: Member) -> str:
    """Its bytes have the fingerprint that was merged, or those of its held copy have.

    Raises Gone when there is neither: trainers delete old checkpoints.
    """
    uri = service.placed(member).uri
    found = _fingerprint(uri)
    if found == member.fingerprint:
        return f"{uri} has fingerprint {found[:16]}"
    missed = (
        f"{uri} is not there any more"
        if found is None
        else f"{uri} has fingerprint {found[:16]}, merged was {member.fingerprint[:16]}: it was "
        "written again since"
    )
    copy = service.workspace.held(member.fingerprint)
    if copy is not None:
        kept = _fingerprint(str(copy))
        if kept != member.fingerprint:
            raise Broken(f"{missed}; the copy that is held has fingerprint {str(kept)[:16]}")
        return f"{missed}; the copy that is held has fingerprint {kept[:16]}"
    if found is None:
        raise Gone(missed)
    raise Broken(missed)


def _fingerprint(uri: str) -> str | None:
    """A checkpoint's fingerprint; None when it is not there, or not all of it."""
    try:
        if not is_s3(uri) and not Path(uri).is_dir():
            return None
        return fingerprint_of(open_checkpoint(uri))
    except (MissingFile, IncompleteCheckpoint):
        return None
