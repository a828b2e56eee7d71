"""The anatomy of each family of models: linears and norms of a layer, and what is around the layers. No torch.

In: the keys of a configuration (with the defaults of transformers' own configuration class for keys that a config.json
may leave out). Out: `Sizes` and `Anatomy`, from which `foretune.model.shape` counts.

Symbols: h hidden size, i intermediate size, q = heads · head_dim, k = key-value heads · head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from foretune.errors import UserError


@dataclass(frozen=True)
class Linear:
    """A linear layer that every transformer layer has. `name` is the module's last name, as peft matches it."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = (
        1  # per transformer layer: GPT-2 has two modules named c_proj, with different shapes; a mixture has experts
    )

    @property
    def parameters(self) -> int:
        """Weights and biases of all copies in one layer."""
        return self.copies * (self.inputs * self.outputs + (self.outputs if self.bias else 0))


class Keys:
    """A configuration with its family's defaults; the first of several names for the same thing wins."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], origin: str) -> None:
        self.values, self.defaults, self.origin = values, defaults, origin

    def get(self, *names: str) -> Any:
        for source in (self.values, self.defaults):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
        return None

    def size(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            problem = (
                f"config.json has no usable {names[0]}" if value is None else f"config.json says {names[0]} = {value!r}"
            )
            raise UserError(
                "model", self.origin, problem, "give the folder of a causal language model in Hugging Face form"
            )
        return value

    def flag(self, name: str) -> bool:
        return bool(self.get(name))


@dataclass(frozen=True)
class Sizes:
    """The sizes nearly every family has, under whatever names."""

    h: int
    i: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def k(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Saved:
    """What autograd keeps of one layer of Hugging Face's own code, as counts of elements per token.

    `hidden` and `mlp` are multiples of h and i in the model's dtype, `hidden_fp32` of h in fp32 (the input of an RMS
    norm). `norms` RMS norms also keep their normalised value for their weight's gradient, in fp32 where `wide`.
    `made_again`: multiples of h that compiled layers can make again (`plan.recompute_pointwise`).
    """

    hidden: int
    mlp: int
    hidden_fp32: int = 0
    norms: int = 0
    wide: bool = False
    queries: int = 2  # rotated queries and the attention's output
    keys: int = 2  # rotated keys, and values
    qk_norm: bool = False
    made_again: int = 2  # what the norms give to attention and MLP
    mlp_read: bool = False  # what the MLP gives is read by a norm: a layer that recomputes makes it again
    fp32_scores: bool = False  # the family has no SDPA: whole attention scores, queries and keys in fp32


_LLAMA_SAVED = Saved(hidden=2, hidden_fp32=2, norms=2, mlp=4)  # gate, its activation, up, their product
_GEMMA_SAVED = Saved(hidden=2, hidden_fp32=2, norms=2, mlp=4, wide=True)
_GEMMA2_SAVED = Saved(hidden=2, hidden_fp32=4, norms=4, mlp=4, wide=True, mlp_read=True)
_LAYER_NORM_SAVED = Saved(
    hidden=4, mlp=2
)  # a LayerNorm keeps input and output, a fused activation its input and output
_TANH_GELU_SAVED = Saved(hidden=4, mlp=5)  # GELU written out: input, half of it, tanh, 1 + tanh, output


@dataclass(frozen=True)
class Anatomy:
    """What differs between families: linears and norms of a layer, what is around the layers, what autograd keeps."""

    linears: tuple[Linear, ...]
    norms: int
    final_norm: int
    saved: Saved
    positions: int = 0
    embedding: int | None = None  # None: V · h
    head_bias: bool = False


def sizes_of(keys: Keys) -> Sizes:
    h = keys.size("hidden_size", "n_embd")
    heads = keys.size("num_attention_heads", "n_head", "num_heads")
    return Sizes(
        h=h,
        heads=heads,
        layers=keys.size("num_hidden_layers", "n_layer", "num_layers"),
        i=keys.size("intermediate_size", "n_inner", "ffn_dim", default=4 * h),
        kv_heads=keys.size("num_key_value_heads", default=heads),
        head_dim=keys.size("head_dim", default=h // heads),
        vocab=keys.size("vocab_size"),
        context=keys.size("max_position_embeddings", "n_positions", default=2048),
    )


def _attention(s: Sizes, *, qkv_bias: bool = False, out_bias: bool = False, out: str = "o_proj") -> tuple[Linear, ...]:
    return (
        Linear("q_proj", s.h, s.q, qkv_bias),
        Linear("k_proj", s.h, s.k, qkv_bias),
        Linear("v_proj", s.h, s.k, qkv_bias),
        Linear(out, s.q, s.h, out_bias),
    )


def _gated_mlp(s: Sizes, bias: bool = False) -> tuple[Linear, ...]:
    return Linear("gate_proj", s.h, s.i, bias), Linear("up_proj", s.h, s.i, bias), Linear("down_proj", s.i, s.h, bias)


def _plain_mlp(s: Sizes, first: str, second: str, bias: bool = True) -> tuple[Linear, ...]:
    return Linear(first, s.h, s.i, bias), Linear(second, s.i, s.h, bias)


def _gpt2(keys: Keys, s: Sizes) -> Anatomy:
    linears = (Linear("c_attn", s.h, 3 * s.h, True), Linear("c_proj", s.h, s.h, True), *_plain_mlp(s, "c_fc", "c_proj"))
    return Anatomy(linears, norms=4 * s.h, final_norm=2 * s.h, saved=_TANH_GELU_SAVED, positions=s.context * s.h)


def _gpt_neo(keys: Keys, s: Sizes) -> Anatomy:
    linears = (*_attention(s, out_bias=True, out="out_proj"), *_plain_mlp(s, "c_fc", "c_proj"))
    return Anatomy(
        linears,
        norms=4 * s.h,
        final_norm=2 * s.h,
        saved=replace(_TANH_GELU_SAVED, fp32_scores=True),
        positions=s.context * s.h,
    )


def _gptj(keys: Keys, s: Sizes) -> Anatomy:
    linears = (*_attention(s, out="out_proj"), *_plain_mlp(s, "fc_in", "fc_out"))
    return Anatomy(
        linears, norms=2 * s.h, final_norm=2 * s.h, saved=Saved(hidden=2, mlp=5, fp32_scores=True), head_bias=True
    )


def _gpt_neox(keys: Keys, s: Sizes) -> Anatomy:
    bias = keys.flag("attention_bias")
    linears = (
        Linear("query_key_value", s.h, 3 * s.h, bias),
        Linear("dense", s.h, s.h, bias),
        *_plain_mlp(s, "dense_h_to_4h", "dense_4h_to_h"),
    )
    return Anatomy(linears, norms=4 * s.h, final_norm=2 * s.h, saved=Saved(hidden=6, mlp=2, made_again=1))


def _opt(keys: Keys, s: Sizes) -> Anatomy:
    bias, affine = keys.flag("enable_bias"), 2 * s.h * keys.flag("layer_norm_elementwise_affine")
    width = keys.size("word_embed_proj_dim", default=s.h)
    around = 2 * width * s.h if width != s.h else 0  # project_in and project_out, without bias
    final = affine if keys.flag("do_layer_norm_before") and not keys.flag("_remove_final_layer_norm") else 0
    linears = (*_attention(s, qkv_bias=bias, out_bias=bias, out="out_proj"), *_plain_mlp(s, "fc1", "fc2", bias))
    # two more positions than the context: OPT's table starts at offset 2
    return Anatomy(
        linears,
        norms=2 * affine,
        final_norm=final,
        saved=Saved(hidden=4, mlp=1),
        positions=(s.context + 2) * s.h,
        embedding=s.vocab * width + around,
    )


def _llama(keys: Keys, s: Sizes) -> Anatomy:
    bias = keys.flag("attention_bias")
    linears = (*_attention(s, qkv_bias=bias, out_bias=bias), *_gated_mlp(s, keys.flag("mlp_bias")))
    return Anatomy(linears, norms=2 * s.h, final_norm=s.h, saved=_LLAMA_SAVED)


def _gemma(keys: Keys, s: Sizes) -> Anatomy:
    return replace(_llama(keys, s), saved=_GEMMA_SAVED)


def _qwen2(keys: Keys, s: Sizes) -> Anatomy:
    return Anatomy((*_attention(s, qkv_bias=True), *_gated_mlp(s)), norms=2 * s.h, final_norm=s.h, saved=_LLAMA_SAVED)


def _qwen3(keys: Keys, s: Sizes) -> Anatomy:
    bias = keys.flag("attention_bias")
    return Anatomy(
        (*_attention(s, qkv_bias=bias, out_bias=bias), *_gated_mlp(s)),
        norms=2 * s.h + 2 * s.head_dim,
        final_norm=s.h,
        saved=replace(_LLAMA_SAVED, qk_norm=True),
    )


def _gemma2(keys: Keys, s: Sizes) -> Anatomy:
    bias = keys.flag("attention_bias")
    return Anatomy(
        (*_attention(s, qkv_bias=bias, out_bias=bias), *_gated_mlp(s)),
        norms=4 * s.h,
        final_norm=s.h,
        saved=_GEMMA2_SAVED,
    )


def _gemma3(keys: Keys, s: Sizes) -> Anatomy:
    bias = keys.flag("attention_bias")
    return Anatomy(
        (*_attention(s, qkv_bias=bias, out_bias=bias), *_gated_mlp(s)),
        norms=4 * s.h + 2 * s.head_dim,
        final_norm=s.h,
        saved=replace(_GEMMA2_SAVED, qk_norm=True),
    )


def _phi(keys: Keys, s: Sizes) -> Anatomy:
    linears = (*_attention(s, qkv_bias=True, out_bias=True, out="dense"), *_plain_mlp(s, "fc1", "fc2"))
    qk_norms = 4 * s.head_dim if keys.flag("qk_layernorm") else 0
    return Anatomy(
        linears,
        norms=2 * s.h + qk_norms,
        final_norm=2 * s.h,
        saved=Saved(hidden=3, mlp=5, made_again=1),
        head_bias=True,
    )


def _phi3(keys: Keys, s: Sizes) -> Anatomy:
    linears = (
        Linear("qkv_proj", s.h, s.q + 2 * s.k),
        Linear("o_proj", s.q, s.h),
        Linear("gate_up_proj", s.h, 2 * s.i),
        Linear("down_proj", s.i, s.h),
    )
    return Anatomy(linears, norms=2 * s.h, final_norm=s.h, saved=replace(_LLAMA_SAVED, queries=3, keys=4))


def _starcoder2(keys: Keys, s: Sizes) -> Anatomy:
    bias = keys.flag("use_bias")
    linears = (*_attention(s, qkv_bias=bias, out_bias=bias), *_plain_mlp(s, "c_fc", "c_proj", bias))
    return Anatomy(linears, norms=4 * s.h, final_norm=2 * s.h, saved=_LAYER_NORM_SAVED)


def _olmo2(keys: Keys, s: Sizes) -> Anatomy:
    bias = keys.flag("attention_bias")  # QK-norms span all heads, unlike Qwen3's
    return Anatomy(
        (*_attention(s, qkv_bias=bias, out_bias=bias), *_gated_mlp(s)),
        norms=2 * s.h + s.q + s.k,
        final_norm=s.h,
        # Its norms come after the blocks.
        saved=replace(_LLAMA_SAVED, qk_norm=True, wide=True, made_again=1, mlp_read=True),
    )


def _unknown(keys: Keys, s: Sizes) -> Anatomy:
    """Llama-like; a mixture of experts counts every expert's gated MLP and the router."""
    experts = keys.get("num_local_experts", "num_experts", "n_routed_experts")
    if not isinstance(experts, int) or experts < 2:
        return Anatomy((*_attention(s), *_gated_mlp(s)), norms=2 * s.h, final_norm=s.h, saved=_LLAMA_SAVED)
    i = keys.size("moe_intermediate_size", default=s.i)
    mlp = (
        Linear("gate_proj", s.h, i, copies=experts),
        Linear("up_proj", s.h, i, copies=experts),
        Linear("down_proj", i, s.h, copies=experts),
        Linear("gate", s.h, experts),
    )
    return Anatomy((*_attention(s), *mlp), norms=2 * s.h, final_norm=s.h, saved=_LLAMA_SAVED)


#: Family → its anatomy, and the defaults of transformers' configuration class for what a config.json may leave out.
# fmt: off
FAMILIES: dict[str, tuple[Callable[[Keys, Sizes], Anatomy], dict[str, Any]]] = {
    "gpt2": (_gpt2, {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
        "tie_word_embeddings": True}),
    "gpt_neo": (_gpt_neo, {"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "vocab_size": 50257,
        "tie_word_embeddings": True}),
    "gptj": (_gptj, {"n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400}),
    "gpt_neox": (_gpt_neox, {"hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "vocab_size": 50432, "attention_bias": True}),
    "opt": (_opt, {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
        "vocab_size": 50272, "enable_bias": True, "do_layer_norm_before": True, "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True}),
    "llama": (_llama, {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000}),
    "mistral": (_llama, {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 131072}),
    "granite": (_llama, {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000}),
    "smollm3": (_llama, {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "intermediate_size": 11008, "vocab_size": 128256, "max_position_embeddings": 32768,
        "tie_word_embeddings": True}),
    "qwen2": (_qwen2, {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 22016, "vocab_size": 151936,
        "max_position_embeddings": 32768}),
    "qwen3": (_qwen3, {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "intermediate_size": 22016, "vocab_size": 151936,
        "max_position_embeddings": 32768}),
    "gemma": (_gemma, {"hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "intermediate_size": 24576, "vocab_size": 256000,
        "max_position_embeddings": 8192, "tie_word_embeddings": True}),
    "gemma2": (_gemma2, {"hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
    "gemma3_text": (_gemma3, {"hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216, "vocab_size": 262208,
        "max_position_embeddings": 131072, "tie_word_embeddings": True}),
    "phi": (_phi, {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "intermediate_size": 8192,
        "vocab_size": 51200}),
    "phi3": (_phi3, {"hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 8192, "vocab_size": 32064, "max_position_embeddings": 4096}),
    "starcoder2": (_starcoder2, {"hidden_size": 3072, "num_hidden_layers": 30, "num_attention_heads": 24,
        "num_key_value_heads": 2, "intermediate_size": 12288, "vocab_size": 49152, "max_position_embeddings": 4096,
        "use_bias": True, "tie_word_embeddings": True}),
    "olmo2": (_olmo2, {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 50304}),
}
# fmt: on


def anatomy_of(family: str) -> tuple[Callable[[Keys, Sizes], Anatomy], dict[str, Any]]:
    """How to read a family, and its defaults; a family that is not listed is read as llama-like."""
    return FAMILIES.get(family, (_unknown, {}))
