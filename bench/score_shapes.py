"""The Llamas that bench/score.py scores, their text, and the work that a token is."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama, and the text it is scored on: ``documents`` of ``length`` tokens.

    With ``mixed`` as many tokens in documents as a crawl has them: half of them below 400 tokens,
    one in a hundred above 4,000.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    documents: int
    length: int
    mixed: bool = False

    @property
    def tokens(self) -> int:
        return self.documents * self.length

    def texts(self) -> list[np.ndarray]:
        """Token ids of each document; token 0, which begins one, is none of them."""
        random = np.random.default_rng(0)
        ids = random.integers(1, self.vocabulary, self.tokens).astype(np.int32)
        if not self.mixed:
            return list(ids.reshape(self.documents, self.length))
        lengths = random.lognormal(np.log(400), 1.0, self.tokens // 16).astype(int).clip(16)
        return [text for text in np.split(ids, np.cumsum(lengths)) if len(text)]

    def config(self) -> dict[str, object]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": True,
        }

    def flop_a_token(self) -> float:
        """Two a weight of every matrix product, and causal attention (half of length x length)."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        weights = self.layers * (attention + 3 * self.hidden * self.intermediate)
        scores = self.layers * 4 * self.hidden * self.context / 2
        return 2 * (weights + self.hidden * self.vocabulary) + scores


SHAPES = {
    "42M, 32k": Shape(512, 8, 1_376, 8, 8, 32_000, 1_024, 4, 2_048),
    "128k": Shape(256, 4, 704, 4, 4, 128_256, 1_024, 4, 2_048),
    "1B": Shape(2_048, 16, 8_192, 32, 8, 128_256, 2_048, 512, 2_048),
    "8B": Shape(4_096, 32, 14_336, 32, 8, 128_256, 2_048, 96, 2_048),
}
SHAPES |= {f"{name}, mixed": replace(SHAPES[name], mixed=True) for name in ("42M, 32k", "1B")}
CPU_SHAPES = ("42M, 32k", "42M, 32k, mixed", "128k")
GPU_SHAPES = ("1B", "8B")
