"""A small real pretraining that leaves its checkpoints in a bucket; the service only watches it.

    python -m flows.demo.trainer --bucket DIR --texts TRAIN.jsonl --tokenizer DIR

A Llama of 1.05 million parameters is trained from scratch by the Hugging Face `Trainer`, so its
`checkpoint-N` folders hold what any such run leaves behind: weights, optimizer, scheduler, random
state and all. It is a program of its own because the service must meet it as it meets any trainer,
through files alone; and it keeps to one thread, because on a machine of two cores the service has
the other one.

The learning rate warms up and then stays constant. That is the regime in which merging pays: each
checkpoint carries noise that a decay would remove and that averaging removes as well.
`--decay-from STEP` has the decay instead, linear to zero at the last step: a trajectory at whose
end there is nothing left to gain.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import (
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        TrainerCallback,
        TrainingArguments,
    )

VOCABULARY = 2_048
END_OF_TEXT = "<|endoftext|>"
BLOCK = 256  # tokens of one training example, and the longest context the model knows
BLOCKS_PER_STEP = 4  # 1,024 tokens a step
LEARNING_RATE = 3e-3
INITIAL_SPREAD = 0.05  # the usual 0.02 is for widths of thousands; here it wastes the first steps
TOKENIZER_TEXT = 3_000_000  # bytes; more does not change 2,048 merges in a way that matters

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True, slots=True)
class Pretraining:
    """One run: the same values give the same trajectory on the same machine."""

    bucket: Path  # where the checkpoint-N folders appear
    texts: Path  # JSON lines with a `text` field
    tokenizer: Path  # folder that `train_tokenizer` wrote
    steps: int = 1_000
    save_every: int = 100
    warmup: int = 40  # steps
    decay_from: int | None = None  # step; None keeps the learning rate constant
    hidden: int = 128  # a multiple of 32, the width of one attention head
    layers: int = 4
    seed: int = 0

    @classmethod
    def beneath(cls, root: Path) -> Pretraining:
        """The demo's run, with everything it reads and writes inside one folder."""
        return cls(root / "bucket", root / "demo" / "train.jsonl", root / "demo" / "tokenizer")

    def arguments(self) -> list[str]:
        """The program's arguments that mean this run."""
        return [
            f"--{field.name.replace('_', '-')}={value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        ]


def train_tokenizer(
    texts: Iterable[str], directory: Path, vocab_size: int = VOCABULARY
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it as a folder that `AutoTokenizer` opens.

    Only the first `TOKENIZER_TEXT` bytes of the texts are read: pass the training part, in an
    order that does not group like with like.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_beginning(texts, size=TOKENIZER_TEXT), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=BLOCK,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(str(directory))
    return wrapped


def pretrain(run: Pretraining) -> None:
    """Train to the last step; each checkpoint is announced by one line on standard error."""
    import torch
    from transformers import PreTrainedTokenizerFast, Trainer, set_seed
    from transformers.trainer_callback import PrinterCallback

    torch.set_num_threads(1)
    set_seed(run.seed)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(run.tokenizer))
    blocks = _blocks(_load(run.texts), tokenizer)
    model = _model(run, tokenizer)
    _say(
        f"{model.num_parameters():,} parameters, {blocks.numel():,} training tokens, {run.steps} "
        f"steps of {BLOCKS_PER_STEP * BLOCK:,} tokens, a checkpoint every {run.save_every}"
    )
    trainer = Trainer(
        model=model,
        args=_arguments(run),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        processing_class=tokenizer,
        callbacks=[_announcer()],
    )
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries to standard output
    trainer.train()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; 0 done, 2 for arguments that cannot be."""
    run = _parse(arguments)
    # Some of these are read once, when a library is imported: they must be there before.
    os.environ.update(_ENVIRONMENT)
    try:
        pretrain(run)
    except KeyboardInterrupt:
        _say("interrupted; the checkpoints announced so far are complete")
        return 130
    return 0


def _arguments(run: Pretraining) -> TrainingArguments:
    from transformers import TrainingArguments

    schedule: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup"}
    if run.decay_from is not None:
        schedule = {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {
                "num_decay_steps": run.steps - run.decay_from,
                "decay_type": "linear",
                "min_lr_ratio": 0.0,
            },
        }
    return TrainingArguments(
        output_dir=str(run.bucket),
        max_steps=run.steps,
        per_device_train_batch_size=BLOCKS_PER_STEP,
        learning_rate=LEARNING_RATE,
        warmup_steps=run.warmup,
        **schedule,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=run.save_every,
        logging_strategy="steps",
        logging_steps=run.save_every,
        seed=run.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
    )


def _model(run: Pretraining, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with the usual proportions: heads of 32, a feed-forward of 8/3 of the width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = run.hidden // 32
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=run.hidden,
        intermediate_size=-(-run.hidden * 8 // 24) * 8,
        num_hidden_layers=run.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        initializer_range=INITIAL_SPREAD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _load(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents in one row, an end token after each, cut to blocks: int64, (blocks, BLOCK)."""
    import torch

    row: list[int] = []
    for text in texts:
        row.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        row.append(int(tokenizer.eos_token_id))
    count = len(row) // BLOCK
    return torch.tensor(row[: count * BLOCK], dtype=torch.long).view(count, BLOCK)


def _announcer() -> TrainerCallback:
    """A callback that says, once a checkpoint is complete, how the training stands.

    Its class is made here because its base comes from a library that takes seconds to import.
    """
    from transformers import TrainerCallback

    class Announcer(TrainerCallback):
        loss = float("nan")
        rate = float("nan")
        since = time.monotonic()
        step = 0

        def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            logs = others.get("logs") or {}
            self.loss = logs.get("loss", self.loss)
            self.rate = logs.get("learning_rate", self.rate)

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            now = time.monotonic()
            pace = (now - self.since) / max(1, state.global_step - self.step)
            self.since, self.step = now, state.global_step
            _say(
                f"checkpoint-{state.global_step} of {state.max_steps}: training loss "
                f"{self.loss:.3f}, learning rate {self.rate:.1e}, {pace:.2f} s a step"
            )

    return Announcer()


def _beginning(texts: Iterable[str], *, size: int) -> Iterable[str]:
    """Whole texts until so many bytes are spent."""
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield text


def _say(line: str) -> None:
    print(f"trainer: {line}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> Pretraining:
    """Arguments to a run; what cannot be is refused here, before the slow imports."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.demo.trainer",
        description="Pretrain a small Llama from scratch and write its checkpoints to a bucket.",
        argument_default=argparse.SUPPRESS,  # so that the defaults stand in one place, Pretraining
    )
    add = parser.add_argument
    add(
        "--bucket",
        type=Path,
        required=True,
        metavar="DIR",
        help="where checkpoint-N appear",
    )
    add(
        "--texts",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines: {"text": ...}',
    )
    add(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="a tokenizer's folder",
    )
    add("--steps", type=int, metavar="N")
    add("--save-every", type=int, metavar="STEPS")
    add("--warmup", type=int, metavar="STEPS")
    add(
        "--decay-from",
        type=int,
        metavar="STEP",
        help="then linearly to zero (default: never)",
    )
    add("--hidden", type=int, metavar="N", help="width, a multiple of 32")
    add("--layers", type=int, metavar="N")
    add("--seed", type=int, metavar="N")
    run = Pretraining(**vars(parser.parse_args(arguments)))

    for name in ("steps", "save_every", "hidden", "layers"):
        if getattr(run, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(run, name)}: must be at least 1")
    if run.hidden % 32:
        parser.error(f"--hidden {run.hidden}: must be a multiple of 32")
    if run.decay_from is not None and not run.warmup <= run.decay_from < run.steps:
        parser.error(
            f"--decay-from {run.decay_from}: must lie between the end of the warmup "
            f"({run.warmup}) and the last step ({run.steps})"
        )
    if not run.texts.is_file():
        parser.error(f"--texts {run.texts}: no such file")
    if not run.tokenizer.is_dir():
        parser.error(f"--tokenizer {run.tokenizer}: no such folder")
    if any(run.bucket.glob("checkpoint-*")):
        parser.error(f"--bucket {run.bucket}: holds checkpoints of an earlier run; name another")
    return run


if __name__ == "__main__":
    sys.exit(main())
