"""``make bench-scale``: many checkpoints, what a publication costs beside its work, a burst.

On the native stack (infra/native): real PostgreSQL, Prefect server, MLflow server and S3 store. The
tables go to ``bench/results/scale.{json,md}``.

known      a look at a bucket of 10,000 checkpoints, each scored and each window declined
overhead   from the start of a look that finds a new checkpoint to the moved alias
burst      200 checkpoints within a minute, two workers, ``execution: deployments``
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.measure import RESULTS, machine, run, write_results
from bench.scale_world import burst, lay_known, lay_texts, train, write_params
from infra.native.stack import Stack

Figures = dict[str, Any]
KNOWN, BURST, MINUTE = 10_000, 200, 60.0


def look(stack: Stack, params_file: Path, **settings: str) -> Figures:
    """One look in a process of its own, inline; ``settings`` are added to its environment."""
    for name, value in {**stack.environment, "CKPTFUSE_EXECUTION": "inline"}.items():
        os.environ[name] = value
    os.environ |= {"CKPTFUSE_PARAMS": str(params_file), **settings}
    done = run([sys.executable, "-m", "bench.scale_look", str(params_file)])
    told: Figures = json.loads(done.output.splitlines()[-1])
    return told


def known(stack: Stack, folder: Path, texts: Path, source: Path, rounds: int) -> Figures:
    """Looks at a bucket where there is nothing to do; the first lists everything."""
    params_file = write_params(folder / "known", texts, "known")
    bucket = stack.state / "s3" / "checkpoints" / "known"
    here = {
        "CKPTFUSE_BUCKET": "s3://checkpoints/known",
        "CKPTFUSE_MLFLOW__TRACKING_URI": stack.url("mlflow"),
    }
    if not (folder / "known" / "laid").is_file():
        shutil.rmtree(bucket, ignore_errors=True)
        shutil.rmtree(folder / "known" / "workspace", ignore_errors=True)
        os.environ |= {**stack.environment, **here, "CKPTFUSE_EXECUTION": "inline"}
        lay_known(source, bucket, params_file, KNOWN)
        (folder / "known" / "laid").touch()
    (folder / "known" / "workspace" / "cache" / "listing.json").unlink(missing_ok=True)
    first = look(stack, params_file, **here)
    again = [look(stack, params_file, **here) for _ in range(rounds)]
    return {"of all files, once an hour": first, "usual": again}


def overhead(stack: Stack, folder: Path, texts: Path, source: Path) -> Figures:
    """A publication for each new checkpoint, after the first that prepares everything."""
    home = folder / "overhead"
    shutil.rmtree(home, ignore_errors=True)
    trajectory = f"overhead-{time.time():.0f}"  # of its own in MLflow, each time
    params_file = write_params(home, texts, trajectory, window={"size": 4, "minimum": 3})
    here = {"CKPTFUSE_BUCKET": str(home / "bucket")}
    (home / "bucket").mkdir()
    steps = sorted(int(path.name.partition("-")[2]) for path in source.iterdir())[-7:]
    looks = []
    for number, step in enumerate(steps):
        shutil.copytree(source / f"checkpoint-{step}", home / "bucket" / f"checkpoint-{step}")
        if number >= 2:
            looks.append(look(stack, params_file, **here))
    return {"looks": looks}


def in_burst(stack: Stack, folder: Path, source: Path) -> Figures:
    """Folders that appear in the bucket in the course of a minute, until all is decided."""
    home = stack.params_file.parent
    ready = sorted(burst(source, BURST), key=lambda path: int(path.name.partition("-")[2]))
    stack.up()
    memory = [workers_mib(stack)]
    began = time.monotonic()
    for number, path in enumerate(ready):
        time.sleep(max(0.0, began + MINUTE * number / len(ready) - time.monotonic()))
        path.rename(stack.bucket / path.name)
    newest = int(ready[-1].name.partition("-")[2])
    while not _is_decided(home, newest):
        time.sleep(5)
        memory.append(workers_mib(stack))
        if time.monotonic() - began > 3000:
            raise RuntimeError("the burst was not worked off; see " + stack.describe())
    seconds = time.monotonic() - began
    scores = Counter(record["model"] for record in _records(home, "score"))
    checkpoints = _records(home, "checkpoint")
    return {
        "seconds": seconds,
        "checkpoints": len(checkpoints),
        "scored once": sum(1 for c in checkpoints if scores[c["fingerprint"]] == 3),
        "score runs": _score_runs(stack),
        "fused windows": len({plan["window"] for plan in _records(home, "plan")}),
        "skipped windows": len(_records(home, "skip")),
        "workers_mib": [memory[0], max(memory), memory[-1]],
        "looks afterwards_mib": _looks_in_one_process(stack),
    }


def _is_decided(home: Path, step: int) -> bool:
    return any(record["step"] == step for record in _records(home, "gate"))


def _records(home: Path, kind: str) -> list[dict[str, Any]]:
    folder = home / "workspace" / "records" / kind
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]


SCORE_RUNS = """
import json
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
chosen = FlowFilter(name=FlowFilterName(any_=["score"]))
with get_client(sync_client=True) as client:
    print(json.dumps([[r.labels.get("prefect.worker.name"), r.state_name, r.idempotency_key]
                      for r in client.read_flow_runs(flow_filter=chosen)]))
"""
#: The service as `ckptfuse watch` runs it, look after look in one process.
LOOKS = """
import json, os, sys
from pathlib import Path
from flows.environment import prepare
prepare(Path(sys.argv[1]).parent / "workspace")
from flows.watch import watch
mib = []
for _ in range(int(sys.argv[2])):
    assert watch(sys.argv[1]).did_nothing
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mib.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
print(json.dumps(mib))
"""


def _score_runs(stack: Stack) -> Mapping[str, int]:
    os.environ |= stack.environment
    told = json.loads(run([sys.executable, "-c", SCORE_RUNS]).output.splitlines()[-1])
    assert len({key for _, _, key in told}) == len(told), "no key twice"
    return Counter(f"{worker}, {state}" for worker, state, _ in told)


def _looks_in_one_process(stack: Stack) -> list[float]:
    """Resident MiB after five looks and after twenty-five."""
    for name in ("worker-cpu", "worker-gpu-1", "worker-gpu-2"):
        stack.daemon(name).stop()
    os.environ |= stack.environment
    done = run([sys.executable, "-c", LOOKS, str(stack.params_file), "25"])
    told: list[float] = json.loads(done.output.splitlines()[-1])
    return [told[4], told[-1]]


def workers_mib(stack: Stack) -> float:
    """Resident memory of the workers' own processes, without the runs they start."""
    total = 0.0
    for name in ("worker-cpu", "worker-gpu-1", "worker-gpu-2"):
        pid = stack.daemon(name).pid()
        if pid is not None:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            total += pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return total


def measured_before(about: Mapping[str, str]) -> dict[str, Figures]:
    """What the results hold of this machine: a part measured alone leaves the others."""
    file = RESULTS / "scale.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    return dict(stored["figures"]) if stored.get("machine") == about else {}


def markdown(figures: Mapping[str, Figures], about: Mapping[str, str]) -> str:
    lines = ["# Scale", "", "Written by `make bench-scale`.", ""]
    lines += [*(f"- {key}: {value}" for key, value in about.items()), ""]
    if "known" in figures:
        lines += _known_lines(figures["known"])
    if "overhead" in figures:
        lines += _overhead_lines(figures["overhead"])
    if "burst" in figures:
        lines += _burst_lines(figures["burst"])
    return "\n".join(lines)


def _known_lines(told: Figures) -> list[str]:
    usual, first = told["usual"], told["of all files, once an hour"]
    seconds = [one["seconds"] - one["prefect"] for one in usual]
    return [
        f"## A look at {usual[0]['checkpoints']:,} known checkpoints on S3",
        "",
        "| look | requests | seconds | of them Prefect's own | peak MiB |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {one['requests']} | {one['seconds']:.2f} | {one['prefect']:.2f} | "
            f"{one['peak_mib']:.0f} |"
            for name, one in [("of all files, once an hour", first), *(("usual", u) for u in usual)]
        ),
        "",
        (
            f"Median beyond Prefect's own: {statistics.median(seconds):.2f} s; "
            f"{usual[0]['requests']} requests, 8 of them for the checkpoints of the window."
        ),
        "",
        "Prefect's own is a flow that does nothing; neither sends heartbeats (see docs/design.md).",
        "",
    ]


def _overhead_lines(told: Figures) -> list[str]:
    lines = [
        "## From the start of a look to the moved alias, one new checkpoint",
        "",
        "| look | seconds | scoring | merging | uploading | overhead |",
        "|---|---|---|---|---|---|",
    ]
    left = []
    for number, one in enumerate(told["looks"]):
        if one["until_alias"] is None:
            lines.append(f"| {number + 1} | - | | | | {', '.join(one['verdicts'])} |")
            continue
        work = [one["work"].get(name, 0.0) for name in ("scoring", "merging", "uploading")]
        beyond = one["until_alias"] - sum(work)
        left += [beyond] if number else []
        cells = " | ".join(f"{value:.1f}" for value in (one["until_alias"], *work, beyond))
        lines.append(f"| {number + 1} | {cells} |")
    if left:
        lines += ["", (f"Median overhead after the first, which makes the ledger: "
                      f"{statistics.median(left):.1f} s.")]  # fmt: skip
    return [*lines, ""]


def _burst_lines(told: Figures) -> list[str]:
    looks = told["looks afterwards_mib"]
    before, most, after = told["workers_mib"]
    return [
        f"## {told['checkpoints']} checkpoints within a minute, two workers",
        "",
        f"- scored once: {told['scored once']}; all decided after {told['seconds']:.0f} s",
        (
            f"- windows fused: {told['fused windows']}, skipped and recorded so: "
            f"{told['skipped windows']}"
        ),
        f"- score runs: {', '.join(f'{n} by {who}' for who, n in told['score runs'].items())}",
        (
            f"- the three worker processes: {before:.0f} MiB before, {most:.0f} at most, "
            f"{after:.0f} after"
        ),
        (
            f"- 25 looks in one process: {looks[0]:.0f} MiB after the 5th, {looks[1]:.0f} after "
            "the last"
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["known", "overhead", "burst"])
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    texts, source = folder / "texts", folder / "run"
    lay_texts(texts)
    train(texts, source)
    home = folder / "burst-home"
    shutil.rmtree(home / "workspace", ignore_errors=True)
    params_file = write_params(home, texts, f"burst-{time.time():.0f}",
                               watch={"interval_seconds": 10, "settle_seconds": 0})  # fmt: skip
    stack = Stack(folder / "stack", params_file)
    about = machine()
    figures = measured_before(about)
    try:
        stack.serve()
        if arguments.only in (None, "known"):
            figures["known"] = known(stack, folder, texts, source, arguments.rounds)
        if arguments.only in (None, "overhead"):
            figures["overhead"] = overhead(stack, folder, texts, source)
        if arguments.only in (None, "burst"):
            figures["burst"] = in_burst(stack, folder, source)
    finally:
        stack.down()
    write_results("scale", about, figures, markdown(figures, about))


if __name__ == "__main__":
    main()
