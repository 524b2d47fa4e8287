"""Whether a folder or an S3 prefix takes, gives back and deletes a file."""

import uuid

from ckptfuse.checks.check import Check, carried_out, failed, ok
from ckptfuse.store import open_store


def written(name: str, url: str, mend: str) -> Check:
    """``mend``: for what cannot be written."""
    return carried_out(name, lambda: _written(name, url), mend)


def _written(name: str, url: str) -> Check:
    store, probe = open_store(url), f"ckptfuse-doctor-{uuid.uuid4().hex}"
    try:
        store.write(probe, b"probe")
        same = store.read(probe) == b"probe"
    finally:
        store.delete(probe)
    if not same:
        return failed(name, f"{url} gave back other bytes than were written", "see its log")
    return ok(name, f"{url}: a file was written, read and deleted")
