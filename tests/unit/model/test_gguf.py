"""Conversion of .gguf files: a small Llama is written in llama.cpp's format and must come back with the same logits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from foretune.errors import UserError
from foretune.model.gguf import ConvertedModel, convert_gguf, read_manifest

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "Ġ th", "Ġth e", "1 2", "Ġ 1", "Ġ1 9", "Ġ19 8", "Ġ198 4"]
TOKENS = SPECIAL + list(bytes_to_unicode().values()) + [merge.replace(" ", "") for merge in MERGES]


def small_llama(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.3,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter lays out query and key weights (convert_hf_to_gguf.py, LlamaModel.permute)."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    splitting: str | None = "smollm",
    metadata: dict[str, Any] | None = None,
    skip: str = "",
    extra: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if splitting is not None:
        writer.add_tokenizer_pre(splitting)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # tied weights once
        array = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = permuted(array, heads)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None
        if skip and skip in target:
            continue
        used = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else kind
        data = gguf.quants.quantize(np.ascontiguousarray(array, dtype=np.float32), used)
        raw = None if used in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16) else used
        writer.add_tensor(target, data, raw_dtype=raw)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_file_comes_back_exactly(tmp_path: Path, tied: bool) -> None:
    model = small_llama(tied=tied)
    file = write_gguf(tmp_path / "small.gguf", model)
    convert_gguf(file, tmp_path / "out", sha256="ab")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert loaded.config.tie_word_embeddings is tied
    assert loaded.config.max_position_embeddings == 128
    assert getattr(loaded.config, "quantization_config", None) is None
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    loaded.train()
    loaded(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    manifest = read_manifest(tmp_path / "out")
    assert manifest == ConvertedModel(
        source="small.gguf", sha256="ab", architecture="llama", dtype="float32",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (gguf.GGMLQuantizationType.F16, torch.float16, 2e-2),
        (gguf.GGMLQuantizationType.BF16, torch.bfloat16, 1e-1),
        (gguf.GGMLQuantizationType.Q8_0, torch.bfloat16, 1e-1),
    ],
)
def test_precision_is_kept_and_blocks_become_bf16(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, dtype: torch.dtype, tolerance: float
) -> None:
    model = small_llama()
    convert_gguf(write_gguf(tmp_path / "small.gguf", model, kind=kind), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    expected, got = logits(model), logits(loaded.float())
    assert (got - expected).norm() <= tolerance * expected.norm()
    assert (got - expected).norm() > 0


def test_tokenizer_template_and_generation_config(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "small.gguf", small_llama())
    convert_gguf(file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize(" 1984") == ["Ġ", "1", "9", "8", "4"]  # each digit alone, though merges say otherwise
    assert tokenizer.tokenize(" the") == ["Ġthe"]
    assert tokenizer.decode(tokenizer("naïve 你好 🙂 12")["input_ids"]) == "naïve 你好 🙂 12"
    assert tokenizer("<|im_start|>x<|im_end|>")["input_ids"][0] == 1
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [2, 0]  # end of turn, then end of text


def test_gpt2_splitting_keeps_its_merges(tmp_path: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "small.gguf", small_llama(), splitting="gpt-2"), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize(" 1984") == ["Ġ1984"]


def refused(file: Path, out: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        convert_gguf(file, out)
    assert caught.value.field == "model"
    assert caught.value.mend
    assert not out.exists()
    assert sorted(path.name for path in out.parent.iterdir()) == [file.name], "something half made was left behind"
    return caught.value


def test_what_would_come_out_wrong_is_refused(tmp_path: Path) -> None:
    model = small_llama()
    file = tmp_path / "small.gguf"

    def problem(**options: Any) -> str:
        return refused(write_gguf(file, model, **options), tmp_path / "out").problem

    assert "unknown here ('viking')" in problem(splitting="viking")
    assert "unknown here (None)" in problem(splitting=None)
    assert "scaled rotary" in problem(metadata={"llama.rope.scaling.type": "linear"})
    assert "scaled rotary" in problem(extra={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)})
    assert "split .gguf" in problem(metadata={"split.count": 3})
    assert "don't match" in problem(skip="blk.1.ffn_up")
    assert "converted model has" in problem(extra={"blk.0.surprise.weight": np.ones(8, dtype=np.float32)})
    assert "can't be converted" in problem(architecture="neverheardof")


def llama3_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """By how much Llama 3.1 stretches each wavelength, as transformers computes it."""
    config = LlamaConfig(head_dim=head_dim, hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=rope)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    factors: torch.Tensor = plain / stretched
    return factors


def test_llama3_positions_are_recovered_from_their_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = small_llama()
    factors = llama3_factors(rope, model.config.head_dim)
    assert factors.max() > 30
    assert factors.min() == 1.0
    model.config.rope_parameters = rope
    scaled = LlamaForCausalLM(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    assert not torch.allclose(logits(scaled), logits(model), atol=1e-4)
    file = write_gguf(tmp_path / "small.gguf", scaled, extra={"rope_freqs.weight": factors.numpy()})
    convert_gguf(file, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.rope_parameters["factor"] == pytest.approx(32.0)
    torch.testing.assert_close(logits(loaded), logits(scaled), rtol=0, atol=1e-5)
    factors[3] *= 1.5
    write_gguf(file, scaled, extra={"rope_freqs.weight": factors.numpy()})
    with pytest.raises(UserError, match="scaled rotary"):
        convert_gguf(file, tmp_path / "other")


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    error = refused(write_gguf(tmp_path / "small.gguf", model), tmp_path / "out")
    assert "NaN" in error.problem
    assert "up_proj" in error.problem


@pytest.mark.parametrize("keep", [0, 3, 10, 500, 4000, -1000])
def test_a_damaged_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = write_gguf(tmp_path / "small.gguf", small_llama())
    file.write_bytes(file.read_bytes()[:keep])
    assert "download it again" in refused(file, tmp_path / "out").mend


def test_something_else_entirely_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    file.write_bytes(b"PK\x03\x04" + os.urandom(2000))
    assert "GGUF" in refused(file, tmp_path / "out").problem


def test_missing_extra_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "small.gguf", small_llama())
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    error = refused(file, tmp_path / "out")
    assert error.mend == 'pip install "foretune[gguf]"'
    assert "sentencepiece" in error.problem


def test_a_manifest_that_is_missing_or_damaged_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / ConvertedModel.file_name).write_text("{")
    assert read_manifest(tmp_path) is None
