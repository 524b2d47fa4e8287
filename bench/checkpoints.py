"""Llama-shaped checkpoints of random bf16 weights, made once and kept between runs.

python -m bench.checkpoints FOLDER
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ckptfuse.merge.arithmetic import Array


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a Llama with tied embeddings; ``shards`` weight files."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    shards: int
    vocabulary: int = 32_000


SMALL = Shape("0.65GB", layers=14, hidden=1280, intermediate=3520, shards=1)
LARGE = Shape("2.5GB", layers=18, hidden=2304, intermediate=6144, shards=3)


def make_window(folder: Path, shape: Shape, count: int) -> list[Path]:
    """``count`` checkpoints of a shape, oldest first."""
    paths = [folder / shape.name / f"checkpoint-{100 * (i + 1)}" for i in range(count)]
    for seed, path in enumerate(paths):
        if not (path / "config.json").exists():
            _make(path, shape, np.random.default_rng(seed))
    return paths


def _make(path: Path, shape: Shape, generator: np.random.Generator) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = list(_tensors(shape))
    weight_map: dict[str, str] = {}
    for number in range(shape.shards):
        file = f"model-{number + 1:05}-of-{shape.shards:05}.safetensors"
        if shape.shards == 1:
            file = "model.safetensors"
        part = names[number :: shape.shards]
        tensors = {name: _draw(generator, size) for name, size in part}
        save_file(tensors, path / file, {"format": "pt"})
        weight_map |= {name: file for name, _ in part}
    if shape.shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(_config(shape)))


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, i = shape.hidden, shape.intermediate
    yield "model.embed_tokens.weight", (shape.vocabulary, h)
    for layer in range(shape.layers):
        for name, size in {
            "input_layernorm": (h,), "post_attention_layernorm": (h,),
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (h, h),
            "self_attn.v_proj": (h, h), "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
        }.items():  # fmt: skip
            yield f"model.layers.{layer}.{name}.weight", size
    yield "model.norm.weight", (h,)


def _draw(generator: np.random.Generator, size: tuple[int, ...]) -> Array:
    """Values of either sign from 2**-9 to 2**-3, every bit of the mantissa in use."""
    drawn = generator.integers(0, 2**10, size, dtype=np.uint16)
    sign, magnitude = (drawn & 1) << 15, 0x3B00 + (drawn >> 1)
    return (sign | magnitude).astype(np.uint16).view(ml_dtypes.bfloat16)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": shape.hidden // 64,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


if __name__ == "__main__":
    make_window(Path(sys.argv[1]), SMALL, 8)
    make_window(Path(sys.argv[1]), LARGE, 4)
