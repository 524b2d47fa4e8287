"""``make bench-merge-s3``: the merge from S3 against bare parallel reads of the same objects.

Loopback: rclone serves a folder as a bucket. ``bare`` reads every byte of a window of 4 x 0.65 GB
by the store's own ranged reads, of the size and as many at once as the engine's; ``engine`` reads,
merges, hashes and writes the merge to a local folder, synced. In turn, each in a process of its
own; medians. The server runs on the client's cores: where these are busy all the time, what the
engine does beside reading is taken from the server, and the quotient of all CPU seconds is the most
that engine / bare can be. Behind a link that leaves the cores some time, it can come to 1. Results
go to ``bench/results/merge_s3.{json,md}``.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local

from bench.checkpoints import SMALL, make_window
from bench.measure import Process, machine, run, write_results
from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.merge.folder import merge_to_stores
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.peak import peak_memory
from ckptfuse.store import FolderStore, open_store
from ckptfuse.store.s3 import S3Store
from tests.servers import rclone

WINDOW = 4
#: What stands between server and client: their common cores, or a network of so many bytes/s.
LINKS = {
    "loopback": (),
    "400 MiB/s": ("--bwlimit", "400M"),
    "200 MiB/s": ("--bwlimit", "200M"),
}
Figures = dict[str, dict[str, list[float]]]
#: Reads at once, as many as the engine has under way with a window of four.
IN_FLIGHT = 8
CPU = ("CPU s, client", "CPU s, server")


def bare(uris: Sequence[str]) -> int:
    """Read all weight files once, into buffers that are used again; returns the bytes."""
    ranges = [
        (store, entry.path, start, min(store.request_size, entry.size - start))
        for store in map(open_store, uris)
        for entry in store.list()
        if entry.path.endswith(".safetensors")
        for start in range(0, entry.size, store.request_size)
    ]
    ranges.sort(key=lambda item: item[2])  # from all objects at once, as the engine reads them
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
    _client_is_ready(uris[0])
    before, memory = time.process_time(), peak_memory()
    started = time.perf_counter()
    size = bare(uris) if name == "bare" else engine(uris, out)
    seconds = time.perf_counter() - started
    figures = {
        "GB/s": size / seconds / 1e9,
        "seconds": seconds,
        "CPU s, client": time.process_time() - before,
        "MiB": (peak_memory() - memory) / 2**20,
    }
    print(json.dumps(figures))


def _client_is_ready(uri: str) -> None:
    """boto3 is imported and connected once a process, whatever the work."""
    open_store(uri).list()


def measure(folder: Path, link: str, flags: Sequence[str], runs: int) -> Figures:
    """``runs`` pairs of both contenders, after one that brings the files into the page cache."""
    bucket = folder / "served" / "bucket"
    bucket.mkdir(parents=True, exist_ok=True)
    paths = make_window(bucket, SMALL, WINDOW)
    uris = [f"s3://bucket/{path.relative_to(bucket)}" for path in paths]
    figures: Figures = {"bare": {}, "engine": {}}
    with rclone(folder, *flags) as server:
        os.environ.update(server.environment)
        for number in range(runs + 1):
            for name, kept in figures.items():
                before = _children_cpu()
                told = json.loads(_process(name, folder / "out", uris).output)
                told["CPU s, server"] = _children_cpu() - before
                for figure, value in told.items():
                    if number:
                        kept.setdefault(figure, []).append(value)
            print(link, number, {n: k["GB/s"][-1:] for n, k in figures.items() if k}, flush=True)
    return figures


def _process(name: str, out: Path, uris: Sequence[str]) -> Process:
    shutil.rmtree(out, ignore_errors=True)
    return run([sys.executable, "-m", "bench.merge_s3", "--one", name, "--folder", str(out), *uris])


def _children_cpu() -> float:
    """CPU seconds of the children that run, which is the server."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    ticks = 0
    for child in children:
        after_name = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])  # user and system; proc_pid_stat(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def markdown(cases: dict[str, Figures], about: dict[str, str]) -> str:
    runs = len(cases[next(iter(cases))]["bare"]["GB/s"])
    request = S3Store.request_size // 2**20
    what = (
        f"{WINDOW} x {SMALL.name} from rclone on loopback, {IN_FLIGHT} reads of {request} MiB at "
        f"once; medians of {runs} runs. MiB: above imports and client. The server runs on the "
        "client's cores. Where these are busy all the time, engine / bare can be no more than the "
        "quotient of all CPU seconds: allowed."
    )
    lines = [
        "# The merge from S3 against bare ranged reads",
        "",
        ", ".join(f"{key}: {value}" for key, value in about.items()),
        "",
        what,
        "",
        "| link | | GB/s | seconds | CPU s of the client | of the server | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for link, figures in cases.items():
        for name, kept in figures.items():
            m = {figure: statistics.median(values) for figure, values in kept.items()}
            lines.append(
                f"| {link} | {name} | {m['GB/s']:.2f} | {m['seconds']:.2f} | {m[CPU[0]]:.2f} "
                f"| {m[CPU[1]]:.2f} | {m['MiB']:.0f} |"
            )
        ratio = _median(figures["engine"], "GB/s") / _median(figures["bare"], "GB/s")
        allowed = _cpu(figures["bare"]) / _cpu(figures["engine"])
        lines.append(f"| {link} | engine / bare | {ratio:.0%} | | allowed: {allowed:.0%} | | |")
    return "\n".join(lines) + "\n"


def _median(figures: dict[str, list[float]], name: str) -> float:
    return statistics.median(figures[name])


def _cpu(figures: dict[str, list[float]]) -> float:
    """CPU seconds of client and server together."""
    return sum(_median(figures, name) for name in CPU)


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
    cases = {link: measure(folder, link, flags, arguments.runs) for link, flags in LINKS.items()}
    about = machine()
    write_results("merge_s3", about, cases, markdown(cases, about))


if __name__ == "__main__":
    main()
