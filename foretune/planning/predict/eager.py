"""What one layer costs beside its matrix products when it runs as the family wrote it, forward and backward.

Counted, not estimated: every kernel of Hugging Face's layers in 16 bits, the bytes that it reads and writes, and the
calls that torch dispatches (views too: the host pays for them). The counts are linear in the layer's widths, and a test
counts them again. A layer that is compiled has fewer of both: see `foretune.planning.predict.timing`.
"""

from __future__ import annotations

from dataclasses import dataclass

from foretune.model.shape import ModelShape


@dataclass(frozen=True)
class Eager:
    """Bytes per token for each element of a width, in 16 bits, and dispatched calls, of one layer and both passes.

    Widths: hidden size; heads times head size, of queries and of keys; inner size of the MLP. Where a family ties two
    of them together, the first has it all.
    """

    hidden: float
    queries: float
    keys: float
    inner: float
    calls: int
    scores: float = 0.0  # bytes per head and position of a row, where no kernel fuses attention

    def bytes_per_token(self, shape: ModelShape, row_length: float) -> float:
        """Memory traffic of one layer in 16 bits, matrix products and fused attention not counted."""
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        ends = self.hidden * shape.hidden_size + self.inner * shape.intermediate_size
        attention = self.scores * shape.num_attention_heads * row_length
        return ends + self.queries * queries + self.keys * keys + attention


_LLAMA = Eager(298, 52, 52, 28, calls=219)
_GPT2 = Eager(66, 0, 0, 94, calls=109)
_BY_FAMILY = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT2,
    "gptj": _GPT2,
    "opt": _GPT2,
    "gpt_neox": Eager(138, 0, 0, 12, calls=146),
    "granite": Eager(314, 52, 52, 28, calls=223),
    "qwen2": Eager(298, 54, 56, 28, calls=228),
    "qwen3": Eager(298, 182, 182, 28, calls=277),
    "gemma": Eager(330, 52, 52, 28, calls=225),
    "gemma2": Eager(618, 52, 64, 28, calls=348, scores=84),
    "gemma3_text": Eager(618, 198, 198, 28, calls=353),
    "phi": Eager(148, 0, 0, 94, calls=202),
    "phi3": Eager(373, 0, 93, 36, calls=202),
    "starcoder2": Eager(126, 0, 31.5, 12, calls=170),
    "olmo2": Eager(330, 238, 238, 28, calls=289),
}


def eager_costs(shape: ModelShape) -> Eager:
    """Of this family; a llama's for one that was not counted."""
    return _BY_FAMILY.get(shape.family, _LLAMA)
