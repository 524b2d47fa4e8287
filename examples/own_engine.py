"""A scoring engine of one's own, for ``scoring.command: [python, examples/own_engine.py]``.

It knows nothing of ckptfuse. It reads the request, loads the model its own way, and prints the
summed negative log-likelihood of each block in nats. This one is the plain loop with transformers;
with another engine only ``losses`` changes.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def losses(model: torch.nn.Module, folder: str) -> list[float]:
    tokens, starts, lengths, context = (
        np.load(Path(folder, f"{name}.npy"), mmap_mode="r")
        for name in ("tokens", "starts", "lengths", "context")
    )
    found = []
    for start, length, read in zip(starts, lengths, context, strict=True):
        block = torch.from_numpy(tokens[start : start + length].astype(np.int64))
        with torch.inference_mode():
            logits = model(input_ids=block[None, :-1]).logits[0, read - 1 :].float()
        nll = torch.nn.functional.cross_entropy(logits, block[read:], reduction="none")
        found.append(float(nll.double().sum()))
    return found


def main(path: str) -> None:
    request = json.loads(Path(path).read_text())
    model = AutoModelForCausalLM.from_pretrained(request["model"], local_files_only=True).eval()
    for blocks in request["blocks"]:
        nll = losses(model, blocks["folder"])
        print(json.dumps({"event": "losses", "blocks": blocks["digest"], "nll": nll}))


if __name__ == "__main__":
    main(sys.argv[1])
