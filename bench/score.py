"""``make bench-score``: this scorer, lm-evaluation-harness and the loop of the transformers guide.

The same random-weight Llamas, text, dtype and device, each scorer in a process of its own, in
turn; medians. On a GPU where there is one (1B and 8B in bfloat16), else on the CPU in float32.
The table goes to ``bench/results/score-DEVICE.{json,md}``.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.measure import machine, run, write_results
from bench.score_shapes import CPU_SHAPES, GPU_SHAPES

Figures = dict[str, list[dict[str, Any]]]  # scorer -> what each of its processes measured


def measure(shape: str, device: str, rounds: int) -> Figures:
    figures: Figures = {}
    for _ in range(rounds):
        for name, arguments in scorers(device).items():
            done = run([sys.executable, "-m", "bench.score_one", *arguments, shape, device])
            figures.setdefault(name, []).append(json.loads(done.output.splitlines()[-1]))
    losses = [run_["loss"] for runs in figures.values() for run_ in runs]
    if max(losses) - min(losses) > (1e-5 if device == "cpu" else 1e-2) * max(losses):
        raise RuntimeError(f"{shape}: the scorers disagree: {losses}")
    return figures


def scorers(device: str) -> Mapping[str, Sequence[str]]:
    found: dict[str, Sequence[str]] = {"ckptfuse": ["ckptfuse"], "transformers guide": ["guide"]}
    if importlib.util.find_spec("lm_eval"):
        for size in (1, 4) if device == "cpu" else (1, 8, 32):
            found[f"lm-eval, batch {size}"] = ["harness", "--batch-size", str(size)]
    return found


def median(runs: Sequence[Mapping[str, Any]], figure: str) -> float:
    return float(statistics.median(run_[figure] for run_ in runs))


def markdown(cases: Mapping[str, Figures], about: Mapping[str, str]) -> str:
    lines = [
        "# Scoring: this scorer, lm-evaluation-harness and the loop of the transformers guide",
        "",
        "Random-weight Llamas, the same text and losses, one process a scorer; written by",
        "`make bench-score`. Utilisation is against one large matrix product in the same process.",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
    ]
    columns = ("tokens a second", "peak MiB above the weights", "model FLOP utilisation")
    for shape, figures in cases.items():
        lines += [f"## {shape}", "", "| scorer | times slower | " + " | ".join(columns) + " |"]
        lines.append("|---|---|" + "---|" * len(columns))
        ours = median(figures["ckptfuse"], columns[0])
        for name, runs in figures.items():
            slower = ours / median(runs, columns[0])
            values = [median(runs, column) for column in columns]
            cells = f"{values[0]:.0f} | {values[1]:.0f} | {values[2]:.0%}"
            lines.append(f"| {name} | {slower:.2f} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine()
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    cases = {shape: measure(shape, device, arguments.rounds) for shape in shapes}
    write_results(f"score-{device}", about, cases, markdown(cases, about))


if __name__ == "__main__":
    main()
