"""A fusion's identity: everything that determines its bytes, and nothing else.

Whoever has the same inputs, weights, output dtype, source of the ancillary files and arithmetic
gets the same folder, byte for byte; so the folder holds no time, place, score or verdict.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ckptfuse.digests import TREE, digest
from ckptfuse.errors import ConfigurationError

#: Version of the merge's arithmetic and of the folder's make-up.
ARITHMETIC = "fp32-ordered-2"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the inputs become an output, beside their weights.

    ``dtype`` is the output's, None for that of the inputs. ``copied`` are patterns of tensor names
    beyond merge.inputs.COPIED that are copied from the newest. ``form`` dcp writes a distributed
    checkpoint to resume from: its ``optimizer`` moments are the newest's, their averages, or left
    out; ``masters`` are patterns of fp32 weights in it beyond layouts.MASTERS. ``converted`` says
    what makes a Hugging Face folder of a layout of the trainer's own (conversion.made_by).
    ``strict`` refuses inputs whose copied tensors differ; it decides no bytes.
    """

    dtype: str | None = None
    copied: tuple[str, ...] = ()
    form: Literal["safetensors", "dcp"] = "safetensors"
    optimizer: Literal["newest", "average", "none"] = "newest"
    masters: tuple[str, ...] = ()
    converted: str | None = None
    strict: bool = False

    def describe(self) -> dict[str, object]:
        """What of it determines bytes."""
        about: dict[str, object] = {
            "dtype": self.dtype or "as-inputs",
            "copied": sorted(self.copied),
            "sharding": "as-ancillary",
            "form": self.form,
        }
        if self.form == "dcp":
            about |= {"optimizer": self.optimizer, "masters": sorted(self.masters)}
        if self.converted is not None:
            about |= {"converted": self.converted, "sharding": "5GB"}
        return about


@dataclass(frozen=True, slots=True)
class FusionSpec:
    """Fingerprints and weights, oldest checkpoint first. Shards follow the ancillary source's."""

    fingerprints: tuple[str, ...]
    weights: tuple[float, ...]
    ancillary: str
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def used(self) -> tuple[tuple[str, float], ...]:
        """The inputs whose weight is not zero: those that are read."""
        pairs = zip(self.fingerprints, self.weights, strict=True)
        return tuple(pair for pair in pairs if pair[1] != 0)

    def narrowed(self) -> "FusionSpec":
        """The same fusion without the inputs that are not read."""
        fingerprints, weights = zip(*self.used, strict=True)
        return replace(self, fingerprints=fingerprints, weights=weights)

    @property
    def id(self) -> str:
        return digest(self.describe())

    @property
    def is_single(self) -> bool:
        """All weight is on one checkpoint: there is nothing to merge."""
        return len(self.used) == 1

    def describe(self) -> dict[str, object]:
        return {
            "arithmetic": ARITHMETIC,
            "inputs": [[fingerprint, weight.hex()] for fingerprint, weight in self.used],
            "ancillary": self.ancillary,
            **self.recipe.describe(),
        }

    def provenance(self, files: Mapping[str, tuple[int, str]]) -> bytes:
        """The text of ``fusion.json``; ``files`` are the others: path -> (size, content hash)."""
        about: dict[str, object] = {"fusion": self.id, **self.describe()}
        about["weights"] = [weight for _, weight in self.used]
        about["content_hash"] = TREE
        about["files"] = {p: {"size": size, "hash": found} for p, (size, found) in files.items()}
        return (json.dumps(about, indent=2, sort_keys=True) + "\n").encode()

    def model_card(self) -> bytes:
        """The text of ``README.md``."""
        bases = "\n".join(f"- {print_[:16]}" for print_, _ in self.used)
        rows = "\n".join(f"| `{print_[:16]}` | {weight:.6f} |" for print_, weight in self.used)
        return f"""---
library_name: transformers
tags: [merge, checkpoint-fusion]
base_model:
{bases}
base_model_relation: merge
---
# Fusion `{self.id[:16]}`

A weighted average of {len(self.used)} checkpoints of one pretraining run, oldest first:

| fingerprint | weight |
|---|---|
{rows}

{self._beside()} `fusion.json` holds all
that is needed to make the same bytes again.
""".encode()

    def _beside(self) -> str:
        if self.recipe.converted is not None:
            return f"It was converted from the trainer's own layout by `{self.recipe.converted}`."
        return f"Configuration, tokenizer and sharding are those of `{self.ancillary[:16]}`."


def check_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights of a merge by hand: finite, and at least one of them not zero."""
    values = tuple(float(weight) for weight in weights)
    if not all(abs(value) < float("inf") for value in values) or not any(values):
        raise ConfigurationError(
            f"weights {list(values)}: finite numbers, not all of them zero, are expected"
        )
    return values
