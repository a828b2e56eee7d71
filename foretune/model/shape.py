"""The shape of a causal language model, from its config.json alone: parameters, layers, linears. No torch.

config.json ──defaults of its family──▶ sizes ──one function per family──▶ `ModelShape`

In: the keys of a Hugging Face configuration. Out: exact parameter counts (tied and untied heads, grouped-query
attention, biases, QK-norm, head_dim ≠ hidden/heads); the tests hold each family against transformers' own model.
A family that is not listed gets a llama-like estimate and says so (`estimated`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretune.errors import UserError
from foretune.model.families import FAMILIES, Keys, Linear, Saved, anatomy_of, sizes_of


@dataclass(frozen=True)
class ModelShape:
    """What the planner needs to know of a model. Counts are of parameters, not bytes."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    context_length: int
    tied: bool
    linears: tuple[Linear, ...]  # of one transformer layer
    layer_norm_parameters: int  # of one transformer layer: norms, QK-norms
    embedding_parameters: int  # token embedding, and projections around it
    position_parameters: int  # learned positions
    final_norm_parameters: int
    saved: Saved  # what autograd keeps of a layer
    head_parameters: int  # 0 when tied (but its bias, where it has one)
    soft_capped_attention: bool = False  # whole attention scores: no fused kernel computes them
    plain_head: bool = True  # the output head is a linear map and nothing more (no soft-capping, no scaling)
    plain_embedding: bool = True  # torch's own lookup (Gemma scales what it looks up, in a class of its own)
    swiglu: bool = False  # the MLP is silu(gate) * up, of three linear maps without biases
    quantised: str | None = None  # the method, where the files hold quantised weights
    stored_dtype: str | None = None  # of the files, as config.json says it
    estimated: bool = False

    @property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer."""
        return sum(linear.parameters for linear in self.linears) + self.layer_norm_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied weights once."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Parameters by part; they sum to `parameters`."""
        linear = self.num_layers * sum(linear.parameters for linear in self.linears)
        norms = self.num_layers * self.layer_norm_parameters + self.final_norm_parameters
        return {
            "embedding": self.embedding_parameters,
            "positions": self.position_parameters,
            "layers": linear,
            "norms": norms,
            "head": self.head_parameters,
        }

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one layer's linears that lead into the MLP's inner width or out of it."""
        i = self.intermediate_size
        return sum(one.parameters for one in self.linears if one.inputs == i or one.outputs in (i, 2 * i))

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: the layers' linears and the output head (tied or not)."""
        linear = sum(linear.copies * linear.inputs * linear.outputs for linear in self.linears)
        return self.num_layers * linear + self.vocab_size * self.hidden_size

    def lora_parameters(self, r: int, target_modules: list[str] | str = "all-linear") -> int:
        """Trainable parameters of adapters of rank r: r · (inputs + outputs) per adapted linear (Hu et al. 2021, §4.1).

        ``all-linear`` is peft's: every linear (GPT-2's Conv1D included) but the output head.

        Raises:
            UserError: a target module that no layer of this model has.
        """
        if target_modules == "all-linear":
            chosen: list[Linear] = list(self.linears)
        else:
            known = {linear.name for linear in self.linears}
            for target in target_modules:
                if target.rsplit(".", 1)[-1] not in known and not self.estimated:
                    raise UserError(
                        "lora.target_modules",
                        target,
                        f"this model ({self.family}) has no linear layer of that name",
                        f"use all-linear or names among {', '.join(sorted(known))}",
                    )
            wanted = {target.rsplit(".", 1)[-1] for target in target_modules}
            chosen = [linear for linear in self.linears if linear.name in wanted]
        return self.num_layers * sum(linear.copies * r * (linear.inputs + linear.outputs) for linear in chosen)


#: With one of these set, logits are more than a linear map of the last hidden state, and the loss needs them whole.
_HEAD_EXTRAS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier_scale",
    "lm_head_multiplier",
)

#: Endings of `architectures` that say "this is no causal language model".
_OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForImageClassification",
    "ForPreTraining",
    "ForCTC",
    "ForSpeechSeq2Seq",
    "ForNextSentencePrediction",
)
_NO_CAUSAL_LM = {
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "deberta",
    "deberta-v2",
    "electra",
    "xlm-roberta",
    "modernbert",
    "mpnet",
    "t5",
    "mt5",
    "bart",
    "mbart",
    "pegasus",
    "whisper",
    "clip",
    "siglip",
    "vit",
    "dinov2",
    "wav2vec2",
    "hubert",
}


def read_shape(folder: Path | str) -> ModelShape:
    """Read a model folder's config.json.

    Raises:
        UserError: (field ``model``) no config.json, not JSON, or no causal language model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        problem = "there is no such folder" if not Path(folder).is_dir() else "holds no config.json"
        raise UserError(
            "model", str(folder), problem, "give a hub id, a folder that save_pretrained wrote, or a .gguf file"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError("model", str(path), f"is not JSON ({error})", "download the model again") from None
    if not isinstance(values, dict):
        raise UserError("model", str(path), "is no JSON object", "download the model again")
    return shape_of(values, origin=str(folder))


def shape_of(values: Mapping[str, Any], *, origin: str) -> ModelShape:
    """The shape that a configuration describes. `origin` is named in errors. Raises as `read_shape` does."""
    _refuse_other_models(values, origin)
    nested = values.get("text_config")
    if isinstance(nested, dict):  # a model with eyes or ears: its language part is counted, so the total is an estimate
        values = {
            **nested,
            "tie_word_embeddings": nested.get("tie_word_embeddings", values.get("tie_word_embeddings", True)),
            "dtype": nested.get("dtype", values.get("dtype")),
        }
    family = str(values.get("model_type", "unknown"))
    read_anatomy, defaults = anatomy_of(family)
    keys = Keys(values, defaults, origin)
    s = sizes_of(keys)
    anatomy = read_anatomy(keys, s)
    tied = values.get("tie_word_embeddings", defaults.get("tie_word_embeddings", False)) is not False
    head = 0 if tied else s.vocab * (s.h if family != "opt" else keys.size("word_embed_proj_dim", default=s.h))
    dtype = values.get("dtype") or values.get("torch_dtype")
    return ModelShape(
        family=family,
        num_layers=s.layers,
        hidden_size=s.h,
        intermediate_size=s.i,
        vocab_size=s.vocab,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        context_length=s.context,
        tied=tied,
        saved=anatomy.saved,
        soft_capped_attention=bool(keys.get("attn_logit_softcapping")),
        linears=anatomy.linears,
        layer_norm_parameters=anatomy.norms,
        final_norm_parameters=anatomy.final_norm,
        embedding_parameters=s.vocab * s.h if anatomy.embedding is None else anatomy.embedding,
        position_parameters=anatomy.positions,
        head_parameters=head + (s.vocab if anatomy.head_bias else 0),
        plain_head=all(keys.get(name) in (None, 0, 1) for name in _HEAD_EXTRAS),
        plain_embedding=not family.startswith("gemma"),
        swiglu=family in FAMILIES and _is_swiglu(keys, anatomy.linears),
        quantised=_quantisation(values),
        stored_dtype=dtype if isinstance(dtype, str) else None,
        estimated=family not in FAMILIES or nested is not None,
    )


def _is_swiglu(keys: Keys, linears: tuple[Linear, ...]) -> bool:
    plain = {linear.name for linear in linears if not linear.bias and linear.copies == 1}
    activation = keys.get("hidden_act", "hidden_activation", "activation_function")
    return plain >= {"gate_proj", "up_proj", "down_proj"} and activation in (None, "silu", "swish")


def _quantisation(values: Mapping[str, Any]) -> str | None:
    section = values.get("quantization_config")
    return str(section.get("quant_method", "unknown method")) if isinstance(section, Mapping) else None


def _refuse_other_models(values: Mapping[str, Any], origin: str) -> None:
    architectures = [str(name) for name in values.get("architectures") or []]
    family = values.get("model_type")
    other = next((name for name in architectures if name.endswith(_OTHER_HEADS)), None)
    mend = "choose a decoder-only model whose architecture ends in ForCausalLM"
    if other is not None and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise UserError("model", origin, f"is a {other}, not a causal language model", mend)
    if values.get("is_encoder_decoder") or family in _NO_CAUSAL_LM:
        raise UserError("model", origin, f"is a {family}, not a causal language model", mend)
