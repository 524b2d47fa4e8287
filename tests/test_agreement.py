"""Scores against those of lm-evaluation-harness and a plain loop, on a model that was trained."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from ckptfuse.blocks import Blocks
from ckptfuse.corpus import Document
from ckptfuse.cut import Cut
from ckptfuse.packing import build
from ckptfuse.perplexity import score_blocks
from ckptfuse.score_records import losses_from, summarise
from ckptfuse.store import FolderStore
from ckptfuse.tokenizing import load_tokenizer
from examples import lm_eval_veto
from tests.conftest import Trajectory

LENGTH = 96


@pytest.fixture(scope="module")
def checkpoint(trajectory: Trajectory) -> Path:
    return trajectory.bucket / "checkpoint-720"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def documents(texts: Path) -> list[str]:
    """Shorter and longer than a block, among them one character and other scripts."""
    lines = (texts / "prose.jsonl").read_text().splitlines()[:6]
    own = [json.loads(line)["text"] for line in lines]
    return [own[0][:50], *[text[:1500] for text in own], "x", "déjà vu 🙂 — naïve\n" * 9]


def blocks_of(documents: list[str], checkpoint: Path, cut: Cut) -> Blocks:
    named = {"text": [Document(text, str(number)) for number, text in enumerate(documents)]}
    return build(named, load_tokenizer(FolderStore(checkpoint)), digest="d", cut=cut)


def test_the_rolling_layout_agrees_with_lm_evaluation_harness(
    model: torch.nn.Module, checkpoint: Path, documents: list[str]
) -> None:
    harness = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(checkpoint),
        max_length=LENGTH,
        batch_size=4,
        softmax_dtype="float32",
        device="cpu",
    )
    asked = [
        Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=number)
        for number, text in enumerate(documents)
    ]
    theirs = -np.asarray(harness.loglikelihood_rolling(asked, disable_tqdm=True))

    blocks = blocks_of(documents, checkpoint, Cut(LENGTH, layout="rolling"))
    nll = score_blocks(model, blocks, vocabulary=1024).nll
    ours = np.bincount(blocks.document, weights=nll)
    assert ours == pytest.approx(theirs, rel=1e-6)

    words = [len(re.split(r"\s+", text)) for text in documents]
    sizes = [len(text.encode()) for text in documents]
    by_word = list(zip(-theirs, words, strict=True))
    by_byte = list(zip(-theirs, sizes, strict=True))
    score = summarise(losses_from(blocks, nll))["text"]
    assert score.bytes == sum(sizes)
    assert score.bits_per_byte == pytest.approx(bits_per_byte(by_byte), rel=1e-6)
    assert 2**score.bits_per_byte == pytest.approx(weighted_perplexity(by_byte), rel=1e-6)
    word_perplexity = math.exp(score.loss * score.tokens / sum(words))
    assert word_perplexity == pytest.approx(weighted_perplexity(by_word), rel=1e-6)


@pytest.mark.parametrize(
    "cut",
    [Cut(LENGTH), Cut(LENGTH, stride=40), Cut(LENGTH, layout="rolling")],
    ids=["packed", "overlapping", "rolling"],
)
def test_every_layout_agrees_with_a_plain_loop_in_double_precision(
    model: torch.nn.Module, checkpoint: Path, documents: list[str], cut: Cut
) -> None:
    blocks = blocks_of(documents, checkpoint, cut)
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    total = 0.0
    for index in range(len(blocks)):
        tokens = torch.from_numpy(blocks.block(index).astype(np.int64))
        with torch.inference_mode():
            logits = exact(input_ids=tokens[None]).logits[0]
        for position in range(int(blocks.context[index]), len(tokens)):
            total -= float(logits[position - 1].log_softmax(-1)[tokens[position]])
    found = score_blocks(model, blocks, vocabulary=1024).nll
    assert found.sum() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(("batch_tokens", "threads"), [(1, 1), (500, 2), (100_000, 1)])
def test_losses_do_not_depend_on_batches_and_threads(
    model: torch.nn.Module, checkpoint: Path, documents: list[str], batch_tokens: int, threads: int
) -> None:
    blocks = blocks_of(documents, checkpoint, Cut(LENGTH))
    expected = score_blocks(model, blocks, vocabulary=1024, batch_tokens=2_000).nll
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = score_blocks(model, blocks, vocabulary=1024, batch_tokens=batch_tokens).nll
    finally:
        torch.set_num_threads(before)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found.sum() == pytest.approx(expected.sum(), rel=1e-6)


def test_a_veto_by_the_harness_writes_one_answer_an_item(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second choice of each item is far longer, so that any model finds it less likely."""
    items = [
        {"question": f"def f{n}(x):", "choices": [" return", " zebra" * 30], "answer": n % 2}
        for n in range(6)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    task = {
        "task": "quiz", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")},
                           "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "quiz.yaml").write_text(json.dumps(task))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm_eval_veto.main(
        str(tmp_path / "quiz.yaml"), "5", str(checkpoint), str(tmp_path / "answers.jsonl")
    )
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"item": f"quiz/{n}", "correct": int(n % 2 == 0)} for n in range(5)
    ]
