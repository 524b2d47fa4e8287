"""What the machine can do: ``merge_ceiling.py OUT COUNT CHECKPOINT ...``, in a process of its own.

Reads all weight files once and writes COUNT files of the last one's size with plain ``read`` and
``write`` through one buffer, without and with a sync to the disk; prints JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

BUFFER = 1024 * 1024  # the fastest of 1, 4 and 16 MiB where this was written


def main(out: str, count: str, *folders: str) -> None:
    buffer = bytearray(BUFFER)
    view = memoryview(buffer)
    started = time.perf_counter()
    sizes = [_read(path, view) for folder in folders for path in _weights(folder)]
    was_read = time.perf_counter()
    written = sum(sizes[-len(_weights(folders[-1])) :])
    descriptors = [_write(Path(out, f"ceiling-{i}"), written, view) for i in range(int(count))]
    was_written = time.perf_counter()
    for descriptor in descriptors:
        os.fsync(descriptor)
        os.close(descriptor)
    ended = time.perf_counter()
    print(
        json.dumps(
            {
                "read": was_read - started,
                "write": was_written - was_read,
                "sync": ended - was_written,
                "read_bytes": sum(sizes),
                "written_bytes": int(count) * written,
            }
        )
    )


def _weights(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def _read(path: Path, view: memoryview) -> int:
    size = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            size += count
    return size


def _write(path: Path, size: int, view: memoryview) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    while size:
        size -= os.write(descriptor, view[: min(size, len(view))])
    return descriptor


if __name__ == "__main__":
    main(*sys.argv[1:])
