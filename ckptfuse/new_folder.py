"""A folder that appears whole or not at all, where several processes may make the same one."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptfuse.errors import StoreError


@contextmanager
def new_folder(folder: Path, *, last: str) -> Iterator[Path]:
    """A temporary folder to write into, which is ``folder`` from the end of the block on.

    ``last`` names a file of it by which another process's is known to be whole: that one stays.
    Raises StoreError where the disk does not take it.
    """
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StoreError(f"cannot write {folder}: {error}") from error
    try:
        temporary.rename(folder)
    except OSError:  # another process made the same one first
        shutil.rmtree(temporary)
        if not (folder / last).is_file():
            raise
