"""The last links: the checkpoints that were merged, where they still are."""

from pathlib import Path

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import MissingFile
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.records import Member
from ckptfuse.store import is_s3
from tasks.chain.evidence import Gone, broken
from tasks.window_file import item_uri


def source_fits(member: Member) -> str:
    """Its bytes have the fingerprint that was merged.

    Raises Gone when it is not there: trainers delete old checkpoints.
    """
    uri = item_uri(member)
    try:
        if not is_s3(uri) and not Path(uri).is_dir():
            raise MissingFile(uri)
        found = fingerprint_of(open_checkpoint(uri))
    except MissingFile as error:
        raise Gone(f"{uri} is not there any more") from error
    if found != member.fingerprint:
        broken(
            f"{uri} has fingerprint {found[:16]}, merged was {member.fingerprint[:16]}: it was "
            "written again since"
        )
    return f"{uri} has fingerprint {found[:16]}"
