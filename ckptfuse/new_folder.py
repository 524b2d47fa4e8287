"""A folder that appears whole or not at all, where several processes may make the same one."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path, *, last: str) -> Iterator[Path]:
    """A temporary folder to write into, which is ``folder`` from the end of the block on.

    ``last`` names a file of it by which another process's is known to be whole: that one stays.
    """
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    yield temporary
    try:
        temporary.rename(folder)
    except OSError:  # another process made the same one first
        shutil.rmtree(temporary)
        if not (folder / last).is_file():
            raise
