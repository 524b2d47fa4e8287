"""``make bench-merge-s3``: the merge from S3 against bare parallel reads of the same objects.

Loopback: rclone serves a folder as a bucket. ``bare`` reads every byte of a window of 4 x 0.65 GB
by the store's own ranged reads, of the size and as many at once as the engine's; ``engine`` reads,
merges, hashes and writes the merge to a local folder, synced. In turn, each in a process of its
own; medians. Server and client share the machine's cores, so what the engine does beside reading
is taken from the server as well. Results go to ``bench/results/merge_s3.{json,md}``.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local

from bench.checkpoints import SMALL, make_window
from bench.measure import machine, run
from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.merge.folder import merge_to_stores
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.store import FolderStore, open_store
from tests.servers import rclone

HERE = Path(__file__).parent
WINDOW = 4
#: Reads at once, as many as the engine has under way with a window of four.
IN_FLIGHT = 16


def bare(uris: Sequence[str]) -> int:
    """Read all weight files once, into buffers that are used again; returns the bytes."""
    stores = [open_store(uri) for uri in uris]
    ranges = [
        (store, entry.path, start, min(store.request_size, entry.size - start))
        for store in stores
        for entry in store.list()
        if entry.path.endswith(".safetensors")
        for start in range(0, entry.size, store.request_size)
    ]
    own = local()

    def read(index: int) -> int:
        store, path, start, length = ranges[index]
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(store.request_size))
        with store.reader(path) as reader:
            reader.read_into(start, own.buffer[:length])
        return length

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        return sum(pool.map(read, range(len(ranges))))


def engine(uris: Sequence[str], out: Path) -> int:
    """Merge uniformly into a folder; returns the bytes that were read."""
    opened = [open_checkpoint(uri) for uri in uris]
    inputs = open_inputs(opened, opened[-1])
    merge_to_stores(inputs, [[1 / len(uris)] * len(uris)], [FolderStore(out)])
    return sum(tensor.length for layout in inputs.layouts for tensor in layout.tensors.values())


def one(name: str, out: Path, uris: Sequence[str]) -> None:
    """In a process of its own: one contender, its figures as JSON."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    size = bare(uris) if name == "bare" else engine(uris, out)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    above = (after.ru_maxrss - before.ru_maxrss) / 1024
    print(
        json.dumps({"GB/s": size / seconds / 1e9, "seconds": seconds, "CPU s": cpu, "MiB": above})
    )


def measure(folder: Path, runs: int) -> dict[str, dict[str, list[float]]]:
    bucket = folder / "served" / "bucket"
    bucket.mkdir(parents=True, exist_ok=True)
    paths = make_window(bucket, SMALL, WINDOW)
    uris = [f"s3://bucket/{path.relative_to(bucket)}" for path in paths]
    figures: dict[str, dict[str, list[float]]] = {"bare": {}, "engine": {}}
    with rclone(folder) as server:
        os.environ.update(server.environment)
        for _ in range(runs + 1):
            for name, kept in figures.items():
                out = folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                program = [sys.executable, "-m", "bench.merge_s3", "--one", name, "--folder"]
                told = json.loads(run([*program, str(out), *uris]).output)
                for figure, value in told.items():
                    kept.setdefault(figure, []).append(value)
    # The first round brings the files into the page cache.
    return {name: {f: v[1:] for f, v in kept.items()} for name, kept in figures.items()}


def markdown(figures: dict[str, dict[str, list[float]]], about: dict[str, str]) -> str:
    medians = {
        name: {figure: statistics.median(values) for figure, values in kept.items()}
        for name, kept in figures.items()
    }
    ratios = [
        e / b for e, b in zip(figures["engine"]["GB/s"], figures["bare"]["GB/s"], strict=True)
    ]
    what = (
        f"{WINDOW} x {SMALL.name} from rclone on loopback, {IN_FLIGHT} reads of 8 MiB at once; "
        f"medians of {len(ratios)} runs. The server shares the cores. MiB: above the imports."
    )
    lines = [
        "# The merge from S3 against bare ranged reads",
        "",
        ", ".join(f"{key}: {value}" for key, value in about.items()),
        "",
        what,
        "",
        "| | GB/s | seconds | CPU s of the client | MiB |",
        "|---|---|---|---|---|",
    ]
    for name, m in medians.items():
        lines.append(
            f"| {name} | {m['GB/s']:.2f} | {m['seconds']:.2f} | {m['CPU s']:.2f} | {m['MiB']:.0f} |"
        )
    ratio = medians["engine"]["GB/s"] / medians["bare"]["GB/s"]
    lines += [
        "",
        f"engine / bare: {ratio:.0%} by the medians, {statistics.median(ratios):.0%} as the median "
        "of neighbouring runs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints; 4 GB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", choices=("bare", "engine"), help=argparse.SUPPRESS)
    parser.add_argument("uris", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.one:
        one(arguments.one, folder, arguments.uris)
        return
    figures = measure(folder, arguments.runs)
    about = machine()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "merge_s3.json").write_text(
        json.dumps({"machine": about, "figures": figures}, indent=1) + "\n"
    )
    text = markdown(figures, about)
    (results / "merge_s3.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
