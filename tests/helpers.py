"""Small things that the unit tests build: checkpoints on disk, records, losses."""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ckptfuse.blocks import Blocks
from ckptfuse.checkpoints import Checkpoint, open_checkpoint
from ckptfuse.corpus import SPLITS, Split
from ckptfuse.losses import Losses
from ckptfuse.params import Params
from ckptfuse.record_files import Arrays
from ckptfuse.records import CheckpointRecord, Member, PlanRecord, ScoreRecord
from ckptfuse.score_records import summarise
from ckptfuse.service import Service, open_service

CONFIG = {"model_type": "toy", "hidden_size": 4}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    config: Mapping[str, object] = CONFIG,
    shards: int = 1,
    age: float = 3600,
) -> Checkpoint:
    """Save tensors as a checkpoint folder that was last written ``age`` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
    else:
        _write_shards(folder, tensors, shards)
    make_older(folder, age)
    return open_checkpoint(str(folder))


def split_weights(folder: Path, shards: int = 2) -> None:
    """Save a checkpoint's one weight file as shards, as its trainer would have, state file last."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    _write_shards(folder, tensors, shards)
    (folder / "trainer_state.json").touch()


def read_only(folder: Path, command: Sequence[str]) -> list[str]:
    """The command, for which nothing in this folder can be written; as it is where we may not."""
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    wrapped = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(folder)]
    works = subprocess.run([*wrapped, "true"], capture_output=True, check=False).returncode == 0
    return [*wrapped, *command] if works else list(command)


def lay_modules_of_a_team(folder: Path) -> None:
    """Modules named as ours and Python's are, such as people have beside their params.yaml."""
    for name in ("tasks", "flows", "profile", "token"):
        (folder / f"{name}.py").write_text("raise RuntimeError(f'{__file__} was imported')\n")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    weight_map = {}
    for number in range(shards):
        names = sorted(tensors)[number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_older(folder: Path, seconds: float) -> None:
    """Set the time of every file in a folder to ``seconds`` ago."""
    then = time.time() - seconds
    for path in folder.iterdir():
        os.utime(path, (then, then))


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, which tell -0.0 from 0.0."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def losses_on(
    nll: np.ndarray,
    *,
    tokens: int | np.ndarray = 10,
    documents: np.ndarray | None = None,
    domain: np.ndarray | None = None,
    domains: tuple[str, ...] = ("text",),
    blocks: str = "blocks",
) -> Losses:
    """Losses of a made-up model: by default one document a block, all of one domain."""
    count = len(nll)
    return Losses(
        blocks,
        domains,
        nll=np.asarray(nll, dtype=np.float64),
        tokens=np.broadcast_to(np.asarray(tokens, dtype=np.int64), (count,)),
        bytes=np.full(count, 40, dtype=np.int64),
        domain=np.zeros(count, np.int32) if domain is None else domain.astype(np.int32),
        document=np.arange(count, dtype=np.int32) if documents is None else documents,
    )


def blocks_of_lengths(
    lengths: Sequence[int],
    *,
    tokens: np.ndarray | None = None,
    documents: Sequence[int] | None = None,
    context: int | Sequence[int] = 1,
    digest: str = "blocks",
) -> Blocks:
    """Blocks of these lengths, all of one domain, of given or seeded random tokens below 96."""
    ends = np.cumsum(lengths)
    drawn = np.random.default_rng(3).integers(0, 96, int(ends[-1])).astype(np.int32)
    count = len(lengths)
    return Blocks(
        digest,
        ("text",),
        tokens=drawn if tokens is None else tokens,
        starts=ends - np.asarray(lengths),
        lengths=np.asarray(lengths, dtype=np.int32),
        context=np.broadcast_to(np.asarray(context, dtype=np.int32), (count,)),
        domain=np.zeros(count, np.int32),
        document=np.asarray(range(count) if documents is None else documents, dtype=np.int32),
        bytes=np.asarray(lengths, dtype=np.int64) * 3,
    )


def member(step: int, loss: float, weight: float = 0.5) -> Member:
    return Member(
        name=f"step{step}", uri=f"/bucket/step{step}", step=step, signature=f"signature-{step}",
        fingerprint=f"fingerprint-{step}", weight=weight, loss=loss,
    )  # fmt: skip


def checkpoint_record(step: int, **changes: object) -> CheckpointRecord:
    """The record of a healthy checkpoint, signature ``s<step>`` unless told otherwise."""
    values: dict[str, object] = {
        "name": f"step{step}", "uri": f"/bucket/step{step}", "step": step, "stage": None,
        "tokens": None, "modified": float(step), "size": 100, "signature": f"s{step}",
        "fingerprint": f"f{step}", "architecture": "usual", "tokenizer": "t", "segment": "one",
        "generation": 1,
    }  # fmt: skip
    return CheckpointRecord.model_validate({**values, **changes})


def make_service(folder: Path, **sections: object) -> Service:
    """A service with a text of one domain and an empty workspace."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"document {number}"}) for number in range(30)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    values: dict[str, object] = {
        "corpus": {"domains": {"text": {"path": str(folder / "text.jsonl")}}},
        "workspace": str(folder / "workspace"),
        **sections,
    }
    return open_service(Params.model_validate(values))


def record_losses(
    service: Service,
    model_id: str,
    nll: np.ndarray,
    splits: Sequence[Split] = SPLITS,
    tokenizer: str = "tokenizer",
    domains: Sequence[str] = ("text",),
) -> None:
    """Leave the records of a scoring job that found these losses; equal parts of each domain."""
    domain = np.repeat(np.arange(len(domains)), len(nll) // len(domains))
    for split in splits:
        key = service.scorer.key(model_id, tokenizer, split)
        losses = losses_on(nll, blocks=f"blocks of {split}", domains=tuple(domains), domain=domain)
        record = ScoreRecord(
            model=model_id,
            blocks=losses.blocks,
            split=split,
            numerics=service.scorer.numerics.key,
            batch_tokens=64,
            domains=summarise(losses),
        )
        arrays: Arrays = {
            name: np.asarray(getattr(losses, name))
            for name in ("nll", "tokens", "bytes", "domain", "document")
        }
        service.records.put(key, record, arrays)


def plan_record(step: int, members: Sequence[Member], **changes: object) -> PlanRecord:
    """What was decided of the window that ends at ``step``; its fusion is ``fusion-<step>``."""
    values: dict[str, object] = {
        "window": f"window-{step}", "step": step, "rule": "uniform", "tokenizer": "tokenizer",
        "members": list(members), "ancillary": members[-1].fingerprint, "dtype": None,
        "fusion": f"fusion-{step}", "notes": {}, "params": "",
    }  # fmt: skip
    return PlanRecord.model_validate({**values, **changes})


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """root may read everything: within, this process is somebody else, who can reach ``folder``."""
    if os.geteuid() != 0:
        yield
        return
    for parent in (folder, *folder.parents[:-2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)
