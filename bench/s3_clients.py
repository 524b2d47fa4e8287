"""Which client reads ranges of S3 fastest: ``python -m bench.s3_clients --folder FOLDER``.

Parallel ranged reads into buffers that are used again, as the merge does them: boto3 as its
documentation has it (``read``), into the buffer by its own ``readinto``, and as the store does it
(from http.client into the buffer); and obstore (Rust, ``pip install obstore``; left out without
it), its bytes copied into the buffer. Three servers on loopback: one that does nothing but
``sendfile``, rclone, and moto, which is so slow that little can be seen. Medians, in turn.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from ckptfuse.store import S3Store
from ckptfuse.store.s3_client import client
from infra.native.postgres import free_port
from tests.servers import S3Server, _serve, moto, rclone

Read = Callable[[str, int, memoryview], None]
MIB = 1024 * 1024
#: Objects and MiB of each, by server.
SIZES = {"sendfile": (8, 300), "rclone": (8, 300), "moto": (2, 96)}


def _get(key: str, start: int, view: memoryview) -> Any:
    span = f"bytes={start}-{start + len(view) - 1}"
    return client().get_object(Bucket="bucket", Key=key, Range=span)["Body"]


def boto3_read(key: str, start: int, view: memoryview) -> None:
    view[:] = _get(key, start, view).read()


def boto3_readinto(key: str, start: int, view: memoryview) -> None:
    body, done = _get(key, start, view), 0
    while done < len(view):
        done += body.readinto(view[done : done + MIB // 4])


def ckptfuse_store(key: str, start: int, view: memoryview) -> None:
    S3Store("bucket", "").read_into(key, start, view)


def obstore_read() -> Read:
    from obstore.store import S3Store as Obstore

    store = Obstore(
        "bucket",
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def read(key: str, start: int, view: memoryview) -> None:
        data = store.get_range(key, start=start, length=len(view))
        np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(data, np.uint8))

    return read


def timed(read: Read, keys: list[str], size: int, request: int, threads: int) -> tuple[float, ...]:
    """GB/s, and CPU seconds a GB of this process."""
    own = local()

    def one(job: tuple[int, str]) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(request))
        start, key = job
        read(key, start, own.buffer[: min(request, size - start)])

    before, started = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, product(range(0, size, request), keys)))
    seconds, cpu = time.perf_counter() - started, time.process_time() - before
    gigabytes = len(keys) * size / 1e9
    return gigabytes / seconds, cpu / gigabytes


@contextmanager
def _sendfile(folder: Path) -> Iterator[S3Server]:
    port = free_port()
    served = str(folder / "served")
    command = [sys.executable, "-m", "bench.range_server", served, str(port)]
    yield from _serve("sendfile", command, port, folder)


def measure(name: str, folder: Path, runs: int, threads: int) -> None:
    count, mebibytes = SIZES[name]
    size = mebibytes * MIB
    keys = [f"object-{number}" for number in range(count)]
    server = {"sendfile": _sendfile, "rclone": rclone, "moto": moto}[name]
    _make(folder / "served" / "bucket", keys, size)
    with server(folder) as running:
        os.environ.update(running.environment)
        client.cache_clear()
        if name == "moto":
            client().create_bucket(Bucket="bucket")
            for key in keys:
                data = (folder / "served" / "bucket" / key).read_bytes()[:size]
                client().put_object(Bucket="bucket", Key=key, Body=data)
        readers: dict[str, Read] = {
            "boto3 read": boto3_read, "boto3 readinto": boto3_readinto, "store": ckptfuse_store
        }  # fmt: skip
        if importlib.util.find_spec("obstore"):
            readers["obstore"] = obstore_read()
        for request in (8 * MIB, 32 * MIB):
            figures: dict[str, list[tuple[float, ...]]] = {reader: [] for reader in readers}
            for _, reader in product(range(runs), list(readers)):
                try:
                    figures[reader].append(timed(readers[reader], keys, size, request, threads))
                except Exception as error:  # what a client cannot do is a result too
                    del readers[reader]
                    print(f"| {name} | {request // MIB} MiB | {reader} | {error!s:.60} | |")
                    break
            for reader in readers:
                speed, cpu = (statistics.median(m) for m in zip(*figures[reader], strict=True))
                print(f"| {name} | {request // MIB} MiB | {reader} | {speed:.2f} | {cpu:.2f} |")


def _make(folder: Path, keys: list[str], size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / key for key in keys):
        if not path.exists() or path.stat().st_size < size:
            path.write_bytes(os.urandom(MIB) * (size // MIB))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for objects; 2.5 GB")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=16)
    arguments = parser.parse_args()
    print(f"{arguments.threads} reads at once, medians of {arguments.runs} runs\n")
    print("| server | request | client | GB/s | CPU s/GB |\n|---|---|---|---|---|")
    for name in SIZES:
        measure(name, arguments.folder.resolve(), arguments.runs, arguments.threads)


if __name__ == "__main__":
    main()
