"""One scorer on one model, in a process of its own (see bench/score.py).

    python -m bench.score_one SCORER SHAPE DEVICE

Scores once and prints the loss and the peak of memory, then once more for every line of standard
input, and prints how fast that was: JSON lines all of them. Nothing but this repository, torch and
transformers is needed (and lm_eval for that scorer).
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.score_shapes import SHAPES, Shape
from ckptfuse.blocks import Blocks
from ckptfuse.cut import Cut
from ckptfuse.heap import keep_freed_memory
from ckptfuse.peak import peak_memory
from ckptfuse.perplexity import score_blocks

#: Scores all documents and answers with the summed negative log-likelihood, nats.
Scorer = Callable[[], float]


def make_model(shape: Shape, device: str) -> torch.nn.Module:
    """A Llama of random weights, made where it is scored: no checkpoint on disk."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = LlamaConfig(**shape.config())
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()  # type: ignore[no-any-return]


def ckptfuse_scorer(model: torch.nn.Module, shape: Shape) -> Scorer:
    """As in the score job."""
    if next(model.parameters()).device.type == "cpu":
        keep_freed_memory()
    blocks = blocks_of(shape)
    return lambda: float(score_blocks(model, blocks, vocabulary=shape.vocabulary).nll.sum())


def blocks_of(shape: Shape) -> Blocks:
    """In the others' layout, or in our own where documents are of all lengths."""
    streams = [np.concatenate([[0], tokens]).astype(np.int32) for tokens in shape.texts()]
    owners = np.repeat(np.arange(len(streams), dtype=np.int32), [len(s) for s in streams])
    cut = Cut(shape.context, layout="packed" if shape.mixed else "rolling")
    spans = np.asarray(cut.spans(owners))
    starts, ends, context = spans.T
    return Blocks(
        "bench", ("text",), np.concatenate(streams), starts, (ends - starts).astype(np.int32),
        context.astype(np.int32), np.zeros(len(spans), np.int32), owners[starts],
        ends - starts - context,
    )  # fmt: skip


def guide_scorer(model: torch.nn.Module, shape: Shape) -> Scorer:
    """The loop of the transformers guide, one window after another, without overlap."""
    device = next(model.parameters()).device

    def score() -> float:
        total = 0.0
        for tokens in shape.texts():
            stream = torch.from_numpy(np.concatenate([[0], tokens])).long()[None].to(device)
            for begin in range(0, stream.shape[1] - 1, shape.context):
                window = stream[:, begin : begin + shape.context + 1]
                with torch.no_grad():
                    loss = model(window, labels=window).loss
                total += float(loss) * (window.shape[1] - 1)
        return total

    return score


def harness_scorer(model: torch.nn.Module, shape: Shape, batch_size: int) -> Scorer:
    """lm-evaluation-harness's loglikelihood_rolling, of text whose token ids are at hand."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0}, "<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>")
    harness = HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=shape.context, batch_size=batch_size,
        softmax_dtype="float32", device=str(next(model.parameters()).device),
    )  # fmt: skip
    ids = {str(n): tokens.tolist() for n, tokens in enumerate(shape.texts())}
    harness.tok_encode = lambda text, **_: ids[text]  # tokenising is not what is compared
    asked = [
        Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=n)
        for n, text in enumerate(ids)
    ]
    return lambda: -sum(harness.loglikelihood_rolling(asked, disable_tqdm=True))


def matrix_rate(model: torch.nn.Module) -> float:
    """Operations a second of one large matrix product in the model's dtype, best of several."""
    weight = next(model.parameters())
    size = 8192 if weight.device.type == "cuda" else 2048
    a = torch.randn(size, size, dtype=weight.dtype, device=weight.device)
    seconds = []
    for _ in range(8):
        started = _now(weight.device)
        a @ a
        seconds.append(_now(weight.device) - started)
    return 2 * size**3 / min(seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Peak:
    """The most memory that was held above what was held at the start, MiB."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        gc.collect()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self._before = _resident()

    def above(self) -> float:
        if self._on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20 - self._before
        return peak_memory() / 2**20 - self._before


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scorer", choices=("ckptfuse", "guide", "harness"))
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--batch-size", type=int, default=1, help="of the harness")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    model = make_model(shape, arguments.device)
    device = next(model.parameters()).device
    makers: dict[str, Callable[[], Scorer]] = {
        "ckptfuse": lambda: ckptfuse_scorer(model, shape),
        "guide": lambda: guide_scorer(model, shape),
        "harness": lambda: harness_scorer(model, shape, arguments.batch_size),
    }
    # What libraries print must not come between the JSON lines.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    score = makers[arguments.scorer]()
    peak = Peak(device)
    first = {"loss": score() / shape.tokens, "peak MiB above the weights": peak.above()}
    print(json.dumps(first), file=answers, flush=True)
    for _ in sys.stdin:
        started = _now(device)
        score()
        rate, matrix = shape.tokens / (_now(device) - started), matrix_rate(model)
        turn = {
            "tokens a second": rate,
            "model FLOP utilisation": rate * shape.flop_a_token() / matrix,
            "matrix TFLOP a second": matrix / 1e12,
        }
        print(json.dumps(turn), file=answers, flush=True)


if __name__ == "__main__":
    main()
