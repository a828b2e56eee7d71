"""Shapes against transformers' own models on the meta device, and adapters against peft."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foretune.errors import UserError
from foretune.model.families import FAMILIES
from foretune.model.shape import ModelShape, read_shape, shape_of

#: Small shapes with all that a count can get wrong: grouped queries, odd head sizes, biases, tied and untied heads.
COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 88,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 131, "n_positions": 64}),
    ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 99, "vocab_size": 131, "tie_word_embeddings": False}),
    ("gpt_neo", {"hidden_size": 48, "num_layers": 2, "num_heads": 6, "attention_types": [[["global", "local"], 1]],
                 "vocab_size": 131, "max_position_embeddings": 64}),
    ("gptj", {"n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 131, "n_positions": 64, "rotary_dim": 4}),
    ("gpt_neox", COMMON),
    ("gpt_neox", {**COMMON, "attention_bias": False, "tie_word_embeddings": True}),
    ("opt", {**COMMON, "ffn_dim": 88, "word_embed_proj_dim": 48}),
    ("opt", {**COMMON, "ffn_dim": 88, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    ("opt", {**COMMON, "ffn_dim": 88, "word_embed_proj_dim": 24, "tie_word_embeddings": False, "enable_bias": False,
             "layer_norm_elementwise_affine": False}),
    ("llama", GROUPED),
    ("llama", COMMON),
    ("llama", {**GROUPED, "head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {**GROUPED, "head_dim": 10}),
    ("granite", {**GROUPED, "attention_bias": True}),
    ("smollm3", GROUPED),
    ("qwen2", GROUPED),
    ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    ("qwen3", {**GROUPED, "head_dim": 16}),
    ("qwen3", {**GROUPED, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    ("gemma", {**GROUPED, "head_dim": 16}),
    ("gemma2", {**GROUPED, "head_dim": 16}),
    ("gemma3_text", {**GROUPED, "head_dim": 16}),
    ("phi", GROUPED),
    ("phi", {**GROUPED, "qk_layernorm": True}),
    ("phi3", GROUPED),
    ("phi3", {**GROUPED, "tie_word_embeddings": True}),
    ("starcoder2", GROUPED),
    ("starcoder2", {**GROUPED, "use_bias": False, "tie_word_embeddings": False}),
    ("olmo2", GROUPED),
]  # fmt: skip


def build(family: str, keys: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys))


def shape_as_saved(model: Any) -> ModelShape:
    """Through the JSON that transformers would write."""
    return shape_of(json.loads(model.config.to_json_string()), origin="test")


def ids(case: tuple[str, dict[str, Any]]) -> str:
    return case[0]


def test_every_family_is_tested() -> None:
    assert {family for family, _ in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_parameters_are_transformers_own(case: tuple[str, dict[str, Any]]) -> None:
    model = build(*case)
    shape = shape_as_saved(model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not shape.estimated
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_defaults_are_transformers_own(family: str) -> None:
    """A config.json that says nothing but its family."""
    model = build(family, {})
    bare = shape_of({"model_type": family}, origin="test")
    assert bare.parameters == sum(p.numel() for p in model.parameters())
    assert dataclasses.replace(shape_as_saved(model), stored_dtype=None) == bare


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_layers_and_linears_are_transformers_own(case: tuple[str, dict[str, Any]]) -> None:
    from transformers.pytorch_utils import Conv1D

    model = build(*case)
    shape = shape_as_saved(model)
    inside = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and any(piece.isdigit() for piece in name.split(".")):
            inside += sum(parameter.numel() for parameter in module.parameters())
    assert inside == shape.parts()["layers"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[0] != "opt" or case[1]["word_embed_proj_dim"] == 48], ids=ids
)
def test_lora_on_all_linears_is_pefts_own(case: tuple[str, dict[str, Any]]) -> None:
    from peft import LoraConfig, get_peft_model

    model = build(*case)
    shape = shape_as_saved(model)
    transposed = case[0] == "gpt2"  # Conv1D keeps its weight the other way round, and peft warns if it is not told
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed)
    adapted = get_peft_model(model, config)
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape.lora_parameters(4) == trainable


def test_lora_on_named_modules() -> None:
    from peft import LoraConfig, get_peft_model

    model = build("llama", GROUPED)
    shape = shape_as_saved(model)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert shape.lora_parameters(3, ["q_proj", "v_proj"]) == sum(
        p.numel() for p in adapted.parameters() if p.requires_grad
    )
    with pytest.raises(UserError, match="no linear layer of that name") as error:
        shape.lora_parameters(3, ["c_attn"])
    assert error.value.field == "lora.target_modules"
    assert "q_proj" in error.value.mend


def test_matmul_parameters_count_the_tied_head() -> None:
    tied = shape_as_saved(build("llama", {**GROUPED, "tie_word_embeddings": True}))
    untied = shape_as_saved(build("llama", GROUPED))
    assert tied.matmul_parameters == untied.matmul_parameters
    assert untied.parameters - tied.parameters == 131 * 48


def test_unknown_family_is_estimated_and_says_so() -> None:
    shape = shape_of({**GROUPED, "model_type": "brand_new"}, origin="test")
    assert shape.estimated
    assert shape.parameters == shape_of({**GROUPED, "model_type": "llama"}, origin="test").parameters


def test_a_mixture_counts_every_expert() -> None:
    one = shape_of({**GROUPED, "model_type": "brand_new_moe"}, origin="test")
    eight = shape_of({**GROUPED, "model_type": "brand_new_moe", "num_local_experts": 8}, origin="test")
    mlp = 3 * 3 * 48 * 88  # three layers of three matrices
    assert eight.parameters - one.parameters == 7 * mlp + 3 * 48 * 8  # and the routers


@pytest.mark.parametrize(
    ("family", "keys", "plain"),
    [
        ("llama", {}, True),
        ("gemma2", {}, False),
        ("gemma3_text", {}, True),
        ("granite", {"logits_scaling": 8.0}, False),
    ],
)
def test_heads_that_do_more_than_multiply(family: str, keys: dict[str, Any], plain: bool) -> None:
    assert shape_as_saved(build(family, {**GROUPED, **keys})).plain_head is plain


def test_the_test_model() -> None:
    folder = Path(__file__).parents[2] / "models" / "stories260K"
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in list(file.keys()))
    assert read_shape(folder).parameters == stored
    assert read_shape(folder).stored_dtype == "float32"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "holds no config.json"),
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        ('{"model_type": "bert"}', "not a causal language model"),
        ('{"model_type": "t5", "is_encoder_decoder": true}', "not a causal language model"),
        ('{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}', "not a causal language model"),
        ('{"model_type": "llama", "hidden_size": "big"}', "hidden_size"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "num_hidden_layers"),
        ("{}", "hidden_size"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=problem) as error:
        read_shape(tmp_path)
    assert error.value.field == "model"


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_shape(tmp_path / "nowhere")
