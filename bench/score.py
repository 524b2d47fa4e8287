"""``make bench-score``: this scorer, lm-evaluation-harness and the loop of the transformers guide.

The same random-weight Llamas, text, dtype and device, each scorer in a process of its own. On a
CPU (float32) all processes stay and take turns, pass by pass, so that a machine that slows down
slows all of them: compared is within a turn, and the figures are medians over turns. On a GPU (1B
and 8B in bfloat16) one follows another, since its memory does not hold them all. The table goes to
``bench/results/score-DEVICE.{json,md}``.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bench.measure import machine, read_results, write_results
from bench.score_shapes import CPU_SHAPES, GPU_SHAPES, SHAPES

Figures = dict[str, list[dict[str, Any]]]  # scorer -> what it printed: the first pass, then turns

PEAK = "peak MiB above the weights"


def measure(shape: str, device: str, rounds: int) -> Figures:
    asked = {name: (*arguments, shape, device) for name, arguments in scorers(device).items()}
    together = [asked] if device == "cpu" else [{name: asked[name]} for name in asked]
    figures: Figures = {}
    for group in together:
        figures |= take_turns(group, rounds)
    losses = [lines[0]["loss"] for lines in figures.values()]
    # bfloat16 rounds; packed documents see those before them, and their first tokens count.
    exact = device == "cpu" and not SHAPES[shape].mixed
    if max(losses) - min(losses) > (1e-5 if exact else 1e-2) * max(losses):
        raise RuntimeError(f"{shape}: the scorers disagree: {losses}")
    return figures


def take_turns(asked: Mapping[str, Sequence[str]], rounds: int) -> Figures:
    with ExitStack() as running:
        passes = {name: running.enter_context(scorer(asked[name])) for name in asked}
        figures = {name: [next(one)] for name, one in passes.items()}
        for turn in range(rounds):
            for name in list(asked)[:: -1 if turn % 2 else 1]:
                figures[name].append(next(passes[name]))
    return figures


@contextmanager
def scorer(arguments: Sequence[str]) -> Iterator[Iterator[dict[str, Any]]]:
    """A running bench/score_one.py; each step of the iterator is one pass of it."""
    command = [sys.executable, "-m", "bench.score_one", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield _passes(process)
        process.communicate()


def _passes(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdin is not None
    assert process.stdout is not None
    while line := process.stdout.readline():
        yield json.loads(line)
        process.stdin.write("\n")
        process.stdin.flush()
    raise RuntimeError(f"{process.args!r} ended with status {process.wait()}")


def scorers(device: str) -> Mapping[str, Sequence[str]]:
    found: dict[str, Sequence[str]] = {"ckptfuse": ["ckptfuse"], "transformers guide": ["guide"]}
    if importlib.util.find_spec("lm_eval"):
        for size in (1, 4) if device == "cpu" else (1, 8):  # of 32 whole logits take 84 GB
            found[f"lm-eval, batch {size}"] = ["harness", "--batch-size", str(size)]
    return found


def markdown(cases: Mapping[str, Figures], about: Mapping[str, str]) -> str:
    lines = [
        "# Scoring: this scorer, lm-evaluation-harness and the loop of the transformers guide",
        "",
        "Random-weight Llamas, the same text and losses, one process a scorer; written by",
        "`make bench-score`. Medians over turns, ratios within a turn (in brackets the middle half",
        "of them). Utilisation is against one large matrix product in the same process, after each",
        "pass. Documents are as long as the context and scored alike; where it says mixed, they",
        "are of all lengths, and this scorer packs them, as it does unless told otherwise.",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
    ]
    columns = ("tokens a second", "model FLOP utilisation")
    for shape, figures in cases.items():
        turns = figures["ckptfuse"][1:]
        ours = [turn[columns[0]] for turn in turns]
        products = [turn["matrix TFLOP a second"] for turn in turns]
        lines += [f"## {shape}, {len(turns)} turns", ""]
        matrix, fastest = statistics.median(products), max(products)
        lines += [f"The matrix product: {matrix:.3g} TFLOP a second, {fastest:.3g} at best.", ""]
        lines.append(f"| scorer | times slower | {' | '.join(columns)} | {PEAK} |")
        lines.append("|---|---|---|---|---|")
        for name, (first, *later) in figures.items():
            rates, utilisation = ([turn[column] for turn in later] for column in columns)
            low, slower, high = quartiles([a / b for a, b in zip(ours, rates, strict=True)])
            cells = (
                f"{slower:.2f} ({low:.2f} to {high:.2f})",
                f"{statistics.median(rates):.0f}",
                f"{statistics.median(utilisation):.0%}",
                f"{first[PEAK]:.0f}",
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def quartiles(values: Sequence[float]) -> list[float]:
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, help="passes of each scorer (CPU: 9, GPU: 3)")
    parser.add_argument("--only", help="one shape; what the results have of the others stays")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine()
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    name = f"score-{device}"
    shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    rounds = arguments.rounds or (9 if device == "cpu" else 3)
    cases = read_results(name, about) if arguments.only else {}
    for shape in [arguments.only] if arguments.only else shapes:
        cases[shape] = measure(shape, device, rounds)
        cases = {shape: cases[shape] for shape in shapes if shape in cases}
        write_results(name, about, cases, markdown(cases, about))


if __name__ == "__main__":
    main()
