"""``make bench-merge``: this engine, mergekit and a plain script against what the machine can do.

All in one run, in turn, in processes of their own, on checkpoints that were read just before, so
that they are in the page cache. Medians; the table goes to ``bench/results/merge.{json,md}``.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.checkpoints import LARGE, SMALL, Shape, make_window
from bench.measure import Process, machine, run, write_results


@dataclass
class Case:
    """A window, the number of outputs, and every figure that was measured of it."""

    shape: Shape
    window: int
    outputs: int = 1
    figures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        many = f", {self.outputs} outputs" if self.outputs > 1 else ""
        return f"{self.window} x {self.shape.name}{many}"

    def add(self, figure: str, value: float) -> None:
        self.figures.setdefault(figure, []).append(value)

    def median(self, figure: str) -> float | None:
        values = self.figures.get(figure)
        return statistics.median(values) if values else None


CASES = (Case(SMALL, 4), Case(SMALL, 8), Case(LARGE, 4), Case(SMALL, 4, outputs=8))


SECONDS = (
    "ceiling", "ceiling, synced", "engine", "ckptfuse merge", "load and average", "mergekit"
)  # fmt: skip


class Bench:
    """The contenders, each of which adds its figures to a case."""

    def __init__(self, folder: Path, mergekit: Path) -> None:
        self.folder = folder
        self.mergekit = mergekit
        self.out = folder / "out"

    def ceiling(self, case: Case, window: Sequence[Path]) -> None:
        values = json.loads(self._script("merge_ceiling", case, window, outputs=True).output)
        case.add("ceiling", values["read"] + values["write"])
        case.add("ceiling, synced", values["read"] + values["write"] + values["sync"])

    def engine(self, case: Case, window: Sequence[Path]) -> None:
        values = json.loads(self._script("merge_engine", case, window, outputs=True).output)
        case.add("engine", values["seconds"])
        case.add("engine MiB", values["above_baseline_mib"])

    def command(self, case: Case, window: Sequence[Path]) -> None:
        pairs = [f"{path}={1 / len(window)}" for path in window]
        ckptfuse = str(Path(sys.executable).with_name("ckptfuse"))
        self._add(
            case, "ckptfuse merge", run([ckptfuse, "merge", str(self.out / "fusion"), *pairs])
        )

    def script(self, case: Case, window: Sequence[Path]) -> None:
        self._add(case, "load and average", self._script("load_and_average", case, window))

    def run_mergekit(self, case: Case, window: Sequence[Path]) -> None:
        models = "\n".join(f"  - {{model: {p}, parameters: {{weight: 1.0}}}}" for p in window)
        config = self.folder / "mergekit.yaml"
        config.write_text(
            f"merge_method: linear\nbase_model: {window[-1]}\nmodels:\n{models}\n"
            "dtype: float32\nout_dtype: bfloat16\n"
        )
        program = str(self.mergekit / "bin/mergekit-yaml")
        self._add(case, "mergekit", run([program, str(config), str(self.out / "mergekit")]))

    def _script(
        self, name: str, case: Case, window: Sequence[Path], *, outputs: bool = False
    ) -> Process:
        count = [str(case.outputs)] if outputs else []
        paths = [str(path) for path in window]
        return run([sys.executable, "-m", f"bench.{name}", str(self.out), *count, *paths])

    @staticmethod
    def _add(case: Case, name: str, process: Process) -> None:
        case.add(name, process.seconds)
        case.add(f"{name} MiB", process.peak_mib)

    def measure(self, case: Case, runs: int) -> None:
        window = make_window(self.folder, case.shape, case.window)
        fast = [self.ceiling, self.engine, *([self.command] if case.outputs == 1 else [])]
        slow = [self.script, self.run_mergekit] if case.outputs == 1 else []
        for number in range(runs):
            for contender in [*fast, *(slow if number < 3 else [])]:
                self._alone(contender, case, window)

    def _alone(
        self,
        contender: Callable[[Case, Sequence[Path]], None],
        case: Case,
        window: Sequence[Path],
    ) -> None:
        self.out.mkdir(parents=True)
        try:
            contender(case, window)
        finally:
            shutil.rmtree(self.out)


def memory_copy_rate() -> float:
    """GB/s of one thread's copy of 512 MB, bytes moved once counted once."""
    source = np.ones(512_000_000, np.uint8)
    target = np.empty_like(source)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        rates.append(source.nbytes / 1e9 / (time.perf_counter() - started))
    return statistics.median(rates)


def markdown(cases: Sequence[Case], about: dict[str, str]) -> str:
    lines = [
        "# Merging: this engine, its alternatives, and what the machine can do",
        "",
        "Medians of whole processes in turn, page cache warm; written by `make bench-merge`.",
        "The ceiling reads every input and writes every output once, with plain `read` and",
        "`write`; synced, it also waits for the disk, as the engine does.",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
        "| seconds | " + " | ".join(case.name for case in cases) + " |",
        "|---|" + "---|" * len(cases),
    ]
    for row in SECONDS:
        lines.append(_row(row, [_text(case.median(row), "{:.2f}") for case in cases]))
    lines.append(_row("engine / ceiling", [_ratio(c, "engine", "ceiling") for c in cases]))
    lines.append(
        _row("engine / ceiling, synced", [_ratio(c, "engine", "ceiling, synced") for c in cases])
    )
    for other in ("load and average", "mergekit"):
        ratios = [_ratio(case, other, "ckptfuse merge") for case in cases]
        lines.append(_row(f"{other} / ckptfuse merge", ratios))
    lines += ["", "| peak MiB | " + " | ".join(case.name for case in cases) + " |"]
    lines.append("|---|" + "---|" * len(cases))
    titles = {"engine MiB": "engine, above its imports"}
    for row in ("engine MiB", "ckptfuse merge MiB", "load and average MiB", "mergekit MiB"):
        title = titles.get(row, row.removesuffix(" MiB"))
        lines.append(_row(title, [_text(case.median(row), "{:.0f}") for case in cases]))
    return "\n".join(lines) + "\n"


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _ratio(case: Case, one: str, other: str) -> str:
    a, b = case.median(one), case.median(other)
    return "" if a is None or b is None else f"{a / b:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints; 20 GB")
    parser.add_argument("--mergekit", type=Path, required=True, help="mergekit's environment")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    bench = Bench(arguments.folder.resolve(), arguments.mergekit.resolve())
    shutil.rmtree(bench.out, ignore_errors=True)
    # In processes of their own: what memory they take would count in those that come from this one.
    run([sys.executable, "-m", "bench.checkpoints", str(bench.folder)])
    copying = "from bench.merge import memory_copy_rate; print(memory_copy_rate())"
    rate = float(run([sys.executable, "-c", copying]).output)
    about = {**machine(), "memory copy": f"{rate:.1f} GB/s"}
    for case in CASES:
        bench.measure(case, arguments.runs)
        print(
            case.name, {name: round(case.median(name) or 0, 2) for name in case.figures}, flush=True
        )
    figures = {case.name: case.figures for case in CASES}
    write_results("merge", about, figures, markdown(CASES, about))


if __name__ == "__main__":
    main()
