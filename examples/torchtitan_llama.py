"""A converter: torchtitan's Llama as a Hugging Face model.

    ckptfuse score outputs/checkpoint/step-1000 --corpus code=code.jsonl \
        --converter examples.torchtitan_llama:to_hf --model llama-hf/

``llama-hf/`` holds config.json and the tokenizer. Two things differ: names, and the order of the
rows of the query and key projections. torchtitan rotates neighbouring pairs of each head's
dimensions, transformers rotates the first half against the second.
"""

import re
from collections.abc import Mapping

import torch

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def to_hf(
    tensors: dict[str, torch.Tensor], config: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    heads = int(str(config["num_attention_heads"]))
    key_heads = int(str(config.get("num_key_value_heads", heads)))
    converted = {}
    for name, values in tensors.items():
        if name in _TOP:
            if name == "output.weight" and config.get("tie_word_embeddings"):
                continue
            converted[_TOP[name]] = values
            continue
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if match is None:
            continue  # freqs_cis and the like: transformers computes them
        if match[2] == "attention.wq.weight":
            values = _halves(values, heads)
        elif match[2] == "attention.wk.weight":
            values = _halves(values, key_heads)
        converted[f"model.layers.{match[1]}.{_LAYER[match[2]]}"] = values
    return converted


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from (pair, member of the pair) to (member of the pair, pair)."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
