"""The Llamas that bench/score.py scores, and the work that a token is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama, and the text it is scored on: ``documents`` of ``length`` tokens."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    documents: int
    length: int

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
    "1B": Shape(2_048, 16, 8_192, 32, 8, 128_256, 2_048, 256, 2_048),
    "8B": Shape(4_096, 32, 14_336, 32, 8, 128_256, 2_048, 96, 2_048),
}
CPU_SHAPES = ("42M, 32k", "128k")
GPU_SHAPES = ("1B", "8B")
