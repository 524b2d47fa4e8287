"""What ``bench.scale`` looks at: ten thousand known checkpoints, a real run, a burst."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.listing import Conventions, find
from ckptfuse.params_loading import load_params
from ckptfuse.records import (
    CheckpointRecord,
    DomainScore,
    GateRecord,
    Member,
    PlanRecord,
    Record,
    ScoreRecord,
)
from ckptfuse.service import Service, open_service
from ckptfuse.steps.weigh import plan_key
from ckptfuse.store import open_store
from ckptfuse.window import window_key, windows
from tasks.marks import mark
from tasks.publish import CURVES, what_curves_show

DOMAINS = ("python", "prose", "c")
#: A checkpoint's files, as the Trainer leaves them; all are links to one checkpoint's.
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin",
)  # fmt: skip


def write_params(folder: Path, texts: Path, trajectory: str, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "trajectory": trajectory,
        "corpus": {
            "domains": {name: {"path": str(texts / f"{name}.jsonl")} for name in DOMAINS},
            "tokens": {"selection": 6_000, "audit": 16_000, "report": 6_000},
            "tokens_per_document": 1_024,
        },
        "scoring": {"block_length": 128, "threads": 1, "device": "cpu"},
        "watch": {"settle_seconds": 0},
        **sections,
    }
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def lay_texts(folder: Path) -> None:
    """This machine's text: to train on, and a file for each domain."""
    from flows.demo.texts import gather, write_jsonl
    from flows.demo.trainer import train_tokenizer

    if (folder / "tokenizer").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    gathered = gather()
    write_jsonl(folder / "train.jsonl", gathered.train)
    for name in DOMAINS:
        write_jsonl(folder / f"{name}.jsonl", gathered.domains[name])
    train_tokenizer(gathered.train, folder / "tokenizer", vocab_size=1024)


def train(texts: Path, bucket: Path) -> None:
    """A small real run under a constant learning rate, twelve checkpoints."""
    if bucket.is_dir():
        return
    command = [
        sys.executable, "-m", "flows.demo.trainer", "--bucket", str(bucket),
        "--texts", str(texts / "train.jsonl"), "--tokenizer", str(texts / "tokenizer"),
        "--hidden", "64", "--layers", "2", "--steps", "720", "--save-every", "60",
        "--warmup", "20",
    ]  # fmt: skip
    subprocess.run(command, check=True)


def burst(source: Path, count: int) -> Iterator[Path]:
    """Folders of further checkpoints of a run: the last one's weights with fresh noise."""
    from safetensors.torch import load_file, save_file

    newest = max(source.iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    weights = load_file(newest / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for number in range(1, count + 1):
        folder = source.parent / "burst" / f"checkpoint-{1000 + 10 * number}"
        shutil.copytree(newest, folder, dirs_exist_ok=True)
        noisy = {
            name: tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in weights.items()
        }
        save_file(noisy, folder / "model.safetensors", {"format": "pt"})
        yield folder


def lay_known(source: Path, bucket: Path, params_file: Path, count: int) -> None:
    """So many checkpoints, each scored, and each window of them declined."""
    newest = max(source.iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    for number in range(1, count + 1):
        folder = bucket / f"checkpoint-{number * 100}"
        folder.mkdir(parents=True)
        for name in FILES:
            if (newest / name).is_file():
                os.link(newest / name, folder / name)
    service = open_service(load_params(params_file))
    listing = find(
        open_store(str(service.params.bucket)), Conventions(settle_seconds=0, known=_Everything())
    )
    checkpoints = [_checkpoint(one) for one in listing.complete]  # type: ignore[arg-type]
    for record in checkpoints:
        _write(service, record.signature, record)
        _write_scores(service, record)
    science, corpus = service.params.scientific_digest(), service.scorer.corpus_digest()
    for window in windows(checkpoints, service.params.window):
        key = window_key(window.newest, science, corpus)
        _write_verdict(service, key, window.members)
    # As if MLflow's curves had been drawn with each of them: all at once takes minutes.
    mark(service, CURVES, what_curves_show(service))


class _Everything:
    """Whatever the signature, it is known: no header is read."""

    def __contains__(self, _: object) -> bool:
        return True


def _checkpoint(listed: Checkpoint) -> CheckpointRecord:
    return CheckpointRecord(
        name=listed.name, uri=listed.uri, step=listed.step, stage=None, tokens=None,
        modified=float(listed.step), size=listed.size, signature=listed.signature,
        fingerprint=f"{listed.step:064x}", architecture="a" * 64, tokenizer="b" * 64,
        segment="c" * 64, generation=1,
    )  # fmt: skip


def _write_scores(service: Service, record: CheckpointRecord) -> None:
    domain = DomainScore(
        loss=2.0, standard_error=0.01, perplexity=7.4, bits_per_byte=0.9, tokens=6_000,
        bytes=20_000, documents=20,
    )  # fmt: skip
    for split in ("selection", "audit", "report"):
        key = service.scorer.key(record.fingerprint, record.tokenizer, split)
        score = ScoreRecord(
            model=record.fingerprint, blocks="d" * 64, split=split,
            numerics=service.scorer.numerics.key, batch_tokens=1_024,
            domains=dict.fromkeys(DOMAINS, domain),
        )  # fmt: skip
        _write(service, key, score)


def _write_verdict(service: Service, window: str, members: tuple[CheckpointRecord, ...]) -> None:
    newest = members[-1]
    plan = PlanRecord(
        window=window, step=newest.step, rule="calibrated", tokenizer=newest.tokenizer,
        members=[
            Member(name=m.name, uri=m.uri, step=m.step, signature=m.signature,
                   fingerprint=m.fingerprint, weight=1 / len(members), loss=2.0)
            for m in members
        ],
        ancillary=newest.fingerprint, dtype=None, fusion=f"{newest.step:064d}", notes={},
        params="e" * 64,
    )  # fmt: skip
    verdict = GateRecord(
        window=window, fusion=plan.fusion, step=newest.step, verdict="declined",
        reason="not better", test=1, alpha=0.01, comparisons=[],
    )  # fmt: skip
    _write(service, plan_key(plan), plan)
    _write(service, window, verdict)


def _write(service: Service, key: str, record: Record) -> None:
    """As ``Records.put`` does, but for the sync to disk of each of a hundred thousand files."""
    folder = service.workspace.root / "records" / record.kind
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{key}.json").write_text(record.model_dump_json(indent=1))
