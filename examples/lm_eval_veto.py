"""A veto by tasks of lm-evaluation-harness, in ``params.yaml``::

    promotion:
      veto: {command: [python, examples/lm_eval_veto.py, "arc_easy,hellaswag", "500"]}

The arguments of your own come first: tasks (names, or paths of task files), and how many items of
each. ckptfuse adds the model folder and the file to write: JSON lines, one an item,
``{"item": "arc_easy/12", "correct": 1}``. Of each task its first metric counts, which must be 0 or
1 for an item, as accuracy and exact match are.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import simple_evaluate


def task_of(name: str) -> str | dict[str, Any]:
    return yaml.safe_load(Path(name).read_text()) if name.endswith(".yaml") else name


def main(tasks: str, limit: str, model: str, out: str) -> None:
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model},
        tasks=[task_of(name) for name in tasks.split(",")],
        limit=int(limit),
        batch_size=8,
        device="cuda" if torch.cuda.is_available() else "cpu",
        bootstrap_iters=0,
    )
    assert found is not None
    with Path(out).open("w") as lines:
        for task, samples in found["samples"].items():
            filtered = samples[0]["filter"]  # a task may judge the same answers in several ways
            for sample in (s for s in samples if s["filter"] == filtered):
                correct = int(sample[sample["metrics"][0]])
                answer = {"item": f"{task}/{sample['doc_id']}", "correct": correct}
                lines.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
