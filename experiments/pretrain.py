"""One run: ``python -m experiments.pretrain FOLDER NAME``. A plain loop: AdamW, float32, a thread.

Each save is a Hugging Face folder with its tokenizer. A decay branch starts from the trunk's own
weights and optimizer, and sees the text that the trunk sees at the same steps.
"""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

from experiments.place import Place
from experiments.runs import BLOCK, Run

TOKENS = "train.pt"
INITIAL_SPREAD = 0.05  # the usual 0.02 is for widths of thousands


def pretrain(run: Run, texts: Path, folder: Path) -> None:
    """Train ``main`` and, if there is one, ``branch`` into ``folder``, which appears whole."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    set_seed(run.seed)
    tokenizer, blocks = load_tokenizer(texts), tokenized(texts)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    trainer = Trainer.fresh(run, blocks, tokenizer)
    fork: Trainer | None = None
    for save in range(1, run.saves + 1):
        trainer.train_to(save * run.every, run.rate_at)
        trainer.save(unfinished / "main")
        if save == run.branch:
            fork = copy.deepcopy(trainer)
    if fork is not None and run.branch is not None:
        for save in range(run.branch + 1, run.branch + run.branch_saves + 1):
            fork.train_to(save * run.every, run.decay_at)
            fork.save(unfinished / "branch")
    unfinished.rename(folder)


@dataclass
class Trainer:
    """A model in training, ``step`` steps old."""

    run: Run
    blocks: torch.Tensor  # int64 [N, BLOCK]
    tokenizer: Any
    model: Any
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def fresh(cls, run: Run, blocks: torch.Tensor, tokenizer: Any) -> "Trainer":
        model = AutoModelForCausalLM.from_config(config_of(run, tokenizer))
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=run.rate, betas=(0.9, 0.95))
        print(
            f"{run.name}: {model.num_parameters():,} parameters, {blocks.numel():,} tokens of text"
        )
        return cls(run, blocks, tokenizer, model.train(), optimizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Trainer":
        """Its own weights and optimizer state; the text is shared."""
        twin = Trainer.fresh(self.run, self.blocks, self.tokenizer)
        twin.model.load_state_dict(self.model.state_dict())
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        twin.step = self.step
        return twin

    def train_to(self, step: int, rate_at: Callable[[int], float]) -> None:
        said = float("nan")
        while self.step < step:
            self.step += 1
            for group in self.optimizer.param_groups:
                group["lr"] = rate_at(self.step)
            rows = self.blocks[batch(self.run, len(self.blocks), self.step)]
            logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            said = loss.item()
        print(f"{self.run.name}: step {step}, loss {said:.3f}", flush=True)

    def save(self, bucket: Path) -> None:
        folder = bucket / f"checkpoint-{self.step}"
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def batch(run: Run, count: int, step: int) -> torch.Tensor:
    """The rows of one step: every epoch is a permutation of its own, the same for a seed."""
    rows = []
    for place in range((step - 1) * run.blocks, step * run.blocks):
        epoch, index = divmod(place, count)
        draw = torch.Generator().manual_seed(1_000 * run.seed + epoch)
        rows.append(torch.randperm(count, generator=draw)[index])
    return torch.stack(rows)


def config_of(run: Run, tokenizer: Any) -> Any:
    """A model of the usual proportions in each architecture."""
    heads = max(run.hidden // 32, 1)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": run.hidden,
        "num_hidden_layers": run.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": BLOCK,
        "initializer_range": INITIAL_SPREAD,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    swiglu = {"intermediate_size": -(-run.hidden * 8 // 24) * 8, "num_key_value_heads": heads}
    own: dict[str, dict[str, Any]] = {
        "llama": swiglu,
        "mixtral": {**swiglu, "num_local_experts": 4, "num_experts_per_tok": 2},
        "gpt_neox": {"intermediate_size": 4 * run.hidden, "tie_word_embeddings": False},
    }
    return AutoConfig.for_model(run.architecture, **{**common, **own[run.architecture]})


def tokenized(texts: Path) -> torch.Tensor:
    """All training text, an end token after each document, cut to blocks; kept once made."""
    kept = texts / TOKENS
    if not kept.exists():
        tokenizer = load_tokenizer(texts)
        row: list[int] = []
        with (texts / "train.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                row += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                row.append(int(tokenizer.eos_token_id))
        count = len(row) // BLOCK
        torch.save(torch.tensor(row[: count * BLOCK]).view(count, BLOCK), f"{kept}.unfinished")
        Path(f"{kept}.unfinished").rename(kept)
    blocks: torch.Tensor = torch.load(kept, weights_only=True)
    return blocks


def load_tokenizer(texts: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(str(texts / "tokenizer"))


def main() -> None:
    place = Place(Path(sys.argv[1]), tiny="--tiny" in sys.argv)
    run = place.run(sys.argv[2])
    pretrain(run, place.texts, place.trained(run.name))


if __name__ == "__main__":
    main()
