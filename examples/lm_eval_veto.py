"""A veto by tasks of lm-evaluation-harness, in ``params.yaml``::

    promotion:
      veto: {command: [python, examples/lm_eval_veto.py, "arc_easy,hellaswag", "500"]}

The arguments of your own come first: tasks, and how many items of each. Then ckptfuse adds the
model folder and the file to write: JSON lines, ``{"item": "arc_easy/12", "correct": 1}``.
"""

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate


def main(tasks: str, limit: str, model: str, out: str) -> None:
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "local_files_only": True},
        tasks=tasks.split(","),
        limit=int(limit),
        batch_size="auto",
        bootstrap_iters=0,
    )
    assert found is not None
    with Path(out).open("w") as lines:
        for task, samples in found["samples"].items():
            for sample in samples:
                answer = {"item": f"{task}/{sample['doc_id']}", "correct": int(sample["acc"])}
                lines.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
