"""Public models by their hub name, so that a plan needs no network: the keys of their config.json that shape them.

Names are as on the hub, with or without the owner and the endings that do not change a shape (-Instruct, -it, -Base …).
The tests hold every entry against the parameter count its makers publish.
"""

from __future__ import annotations

import difflib
from typing import Any

from foretune.model.shape import ModelShape, shape_of

#: hidden, layers, heads, key-value heads, intermediate, vocabulary, context; then what the family's default is not
_Row = tuple[int, int, int, int, int, int, int, dict[str, Any]]
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
_SPLIT_128: dict[str, Any] = {"head_dim": 128}
_SMALL_OPT: dict[str, Any] = {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
_K32, _K131 = 32768, 131072

# fmt: off
_MODELS: dict[str, dict[str, _Row]] = {
    "gpt2": {
        "gpt2": (768, 12, 12, 12, 3072, 50257, 1024, _TIED),
        "gpt2-medium": (1024, 24, 16, 16, 4096, 50257, 1024, _TIED),
        "gpt2-large": (1280, 36, 20, 20, 5120, 50257, 1024, _TIED),
        "gpt2-xl": (1600, 48, 25, 25, 6400, 50257, 1024, _TIED),
        "distilgpt2": (768, 6, 12, 12, 3072, 50257, 1024, _TIED),
    },
    "gpt_neox": {
        "pythia-70m": (512, 6, 8, 8, 2048, 50304, 2048, {}),
        "pythia-160m": (768, 12, 12, 12, 3072, 50304, 2048, {}),
        "pythia-410m": (1024, 24, 16, 16, 4096, 50304, 2048, {}),
        "pythia-1b": (2048, 16, 8, 8, 8192, 50304, 2048, {}),
        "pythia-1.4b": (2048, 24, 16, 16, 8192, 50304, 2048, {}),
        "pythia-2.8b": (2560, 32, 32, 32, 10240, 50304, 2048, {}),
        "pythia-6.9b": (4096, 32, 32, 32, 16384, 50432, 2048, {}),
        "pythia-12b": (5120, 36, 40, 40, 20480, 50688, 2048, {}),
    },
    "opt": {
        "opt-125m": (768, 12, 12, 12, 3072, 50272, 2048, {}),
        "opt-350m": (1024, 24, 16, 16, 4096, 50272, 2048, _SMALL_OPT),
        "opt-1.3b": (2048, 24, 32, 32, 8192, 50272, 2048, {}),
        "opt-2.7b": (2560, 32, 32, 32, 10240, 50272, 2048, {}),
        "opt-6.7b": (4096, 32, 32, 32, 16384, 50272, 2048, {}),
    },
    "llama": {
        "smollm2-135m": (576, 30, 9, 3, 1536, 49152, 8192, _TIED),
        "smollm2-360m": (960, 32, 15, 5, 2560, 49152, 8192, _TIED),
        "smollm2-1.7b": (2048, 24, 32, 32, 8192, 49152, 8192, _TIED),
        "tinyllama-1.1b": (2048, 22, 32, 4, 5632, 32000, 2048, {}),
        "llama-2-7b": (4096, 32, 32, 32, 11008, 32000, 4096, {}),
        "llama-2-13b": (5120, 40, 40, 40, 13824, 32000, 4096, {}),
        "llama-2-70b": (8192, 80, 64, 8, 28672, 32000, 4096, {}),
        "llama-3-8b": (4096, 32, 32, 8, 14336, 128256, 8192, {}),
        "llama-3-70b": (8192, 80, 64, 8, 28672, 128256, 8192, {}),
        "llama-3.1-8b": (4096, 32, 32, 8, 14336, 128256, _K131, {}),
        "llama-3.1-70b": (8192, 80, 64, 8, 28672, 128256, _K131, {}),
        "llama-3.1-405b": (16384, 126, 128, 8, 53248, 128256, _K131, {}),
        "llama-3.2-1b": (2048, 16, 32, 8, 8192, 128256, _K131, {**_TIED, "head_dim": 64}),
        "llama-3.2-3b": (3072, 28, 24, 8, 8192, 128256, _K131, {**_TIED, **_SPLIT_128}),
        "llama-3.3-70b": (8192, 80, 64, 8, 28672, 128256, _K131, {}),
        "deepseek-llm-7b": (4096, 30, 32, 32, 11008, 102400, 4096, {}),
        "deepseek-r1-distill-llama-8b": (4096, 32, 32, 8, 14336, 128256, _K131, {}),
        "deepseek-r1-distill-llama-70b": (8192, 80, 64, 8, 28672, 128256, _K131, {}),
    },
    "smollm3": {"smollm3-3b": (2048, 36, 16, 4, 11008, 128256, 65536, _TIED)},
    "mistral": {
        "mistral-7b-v0.1": (4096, 32, 32, 8, 14336, 32000, _K32, {}),
        "mistral-7b-v0.2": (4096, 32, 32, 8, 14336, 32000, _K32, {}),
        "mistral-7b-v0.3": (4096, 32, 32, 8, 14336, 32768, _K32, {}),
        "ministral-8b-2410": (4096, 36, 32, 8, 12288, 131072, _K32, _SPLIT_128),
        "mistral-nemo-2407": (5120, 40, 32, 8, 14336, 131072, _K131, _SPLIT_128),
        "mistral-small-24b-2501": (5120, 40, 32, 8, 32768, 131072, _K32, _SPLIT_128),
    },
    "qwen2": {
        "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, _K32, _TIED),
        "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, _K32, _TIED),
        "qwen2.5-3b": (2048, 36, 16, 2, 11008, 151936, _K32, _TIED),
        "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, _K32, _UNTIED),
        "qwen2.5-14b": (5120, 48, 40, 8, 13824, 152064, _K32, _UNTIED),
        "qwen2.5-32b": (5120, 64, 40, 8, 27648, 152064, _K32, _UNTIED),
        "qwen2.5-72b": (8192, 80, 64, 8, 29568, 152064, _K32, _UNTIED),
        "deepseek-r1-distill-qwen-1.5b": (1536, 28, 12, 2, 8960, 151936, _K131, _UNTIED),
        "deepseek-r1-distill-qwen-7b": (3584, 28, 28, 4, 18944, 152064, _K131, _UNTIED),
        "deepseek-r1-distill-qwen-14b": (5120, 48, 40, 8, 13824, 152064, _K131, _UNTIED),
        "deepseek-r1-distill-qwen-32b": (5120, 64, 40, 8, 27648, 152064, _K131, _UNTIED),
    },
    "qwen3": {
        "qwen3-0.6b": (1024, 28, 16, 8, 3072, 151936, 40960, {**_TIED, **_SPLIT_128}),
        "qwen3-1.7b": (2048, 28, 16, 8, 6144, 151936, 40960, {**_TIED, **_SPLIT_128}),
        "qwen3-4b": (2560, 36, 32, 8, 9728, 151936, 40960, {**_TIED, **_SPLIT_128}),
        "qwen3-8b": (4096, 36, 32, 8, 12288, 151936, 40960, {**_UNTIED, **_SPLIT_128}),
        "qwen3-14b": (5120, 40, 40, 8, 17408, 151936, 40960, {**_UNTIED, **_SPLIT_128}),
        "qwen3-32b": (5120, 64, 64, 8, 25600, 151936, 40960, {**_UNTIED, **_SPLIT_128}),
        "deepseek-r1-0528-qwen3-8b": (4096, 36, 32, 8, 12288, 151936, _K131, {**_UNTIED, **_SPLIT_128}),
    },
    "gemma": {
        "gemma-2b": (2048, 18, 8, 1, 16384, 256000, 8192, {"head_dim": 256}),
        "gemma-7b": (3072, 28, 16, 16, 24576, 256000, 8192, {"head_dim": 256}),
    },
    "gemma2": {
        "gemma-2-2b": (2304, 26, 8, 4, 9216, 256000, 8192, {"head_dim": 256}),
        "gemma-2-9b": (3584, 42, 16, 8, 14336, 256000, 8192, {"head_dim": 256}),
        "gemma-2-27b": (4608, 46, 32, 16, 36864, 256000, 8192, _SPLIT_128),
    },
    "gemma3_text": {
        "gemma-3-270m": (640, 18, 4, 1, 2048, 262144, _K32, {"head_dim": 256}),
        "gemma-3-1b": (1152, 26, 4, 1, 6912, 262144, _K32, {"head_dim": 256}),
    },
    "phi": {
        "phi-1": (2048, 24, 32, 32, 8192, 51200, 2048, {}),
        "phi-1_5": (2048, 24, 32, 32, 8192, 51200, 2048, {}),
        "phi-2": (2560, 32, 32, 32, 10240, 51200, 2048, {}),
    },
    "phi3": {
        "phi-3-mini-4k": (3072, 32, 32, 32, 8192, 32064, 4096, {}),
        "phi-3-mini-128k": (3072, 32, 32, 32, 8192, 32064, _K131, {}),
        "phi-3.5-mini": (3072, 32, 32, 32, 8192, 32064, _K131, {}),
        "phi-3-medium-4k": (5120, 40, 40, 10, 17920, 32064, 4096, {}),
        "phi-4": (5120, 40, 40, 10, 17920, 100352, 16384, {}),
        "phi-4-mini": (3072, 32, 24, 8, 8192, 200064, _K131, _TIED),
    },
    # The language part of models that also see: their vision towers are not in these counts.
    "gemma3": {
        "gemma-3-4b": (2560, 34, 8, 4, 10240, 262208, _K131, {"head_dim": 256}),
        "gemma-3-12b": (3840, 48, 16, 8, 15360, 262208, _K131, {"head_dim": 256}),
        "gemma-3-27b": (5376, 62, 32, 16, 21504, 262208, _K131, _SPLIT_128),
    },
}
# fmt: on
_BY_NAME = {name: (family, row) for family, rows in _MODELS.items() for name, row in rows.items()}
_SAME_SHAPE = ("-instruct", "-it", "-chat", "-base", "-hf", "-pt", "-deduped", "-2507")


def known_names() -> list[str]:
    """Every name of the table."""
    return sorted(_BY_NAME)


def nearest_names(name: str) -> list[str]:
    """Up to three names of the table that look like `name`, best first."""
    return difflib.get_close_matches(_bare(name), known_names(), n=3, cutoff=0.5)


def known_config(name: str) -> dict[str, Any] | None:
    """The keys of a public model's config.json that shape it; None if the table lacks the model."""
    found = _BY_NAME.get(_bare(name))
    if found is None:
        return None
    family, (hidden, layers, heads, kv_heads, intermediate, vocabulary, context, extra) = found
    keys = {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        **extra,
    }
    return {"model_type": family, "text_config": {**keys, "model_type": "gemma3_text"}} if family == "gemma3" else keys


def known_shape(name: str) -> ModelShape | None:
    """The shape of a public model, by hub name with or without its owner; None if the table lacks it."""
    config = known_config(name)
    return shape_of(config, origin=name) if config is not None else None


def _bare(name: str) -> str:
    """A hub name without owner, capitals and the endings that name a variant of the same shape."""
    bare = name.rsplit("/", 1)[-1].lower().replace("meta-", "").replace("-coder-", "-")
    shorter = True
    while bare not in _BY_NAME and shorter:
        shorter = False
        for piece in _SAME_SHAPE:
            if piece in bare and bare.replace(piece, "") != bare:
                bare, shorter = bare.replace(piece, "", 1), True
    return bare
