"""Writing tensors one by one: bounded memory, nothing broken, published names."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from foretune.errors import VerificationFailed
from foretune.exporting.export import _as_published
from foretune.exporting.weights import check_weights, digest, write_weights


def test_no_more_than_a_shard_is_held(tmp_path: Path) -> None:
    """Each tensor is made when it is asked for; those of shards that are written are gone by then."""
    alive: list[weakref.ref[Any]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(40):
            tensor = torch.full((250,), float(number))  # 1000 bytes
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"t{number:02d}", tensor

    written = write_weights(tensors(), tmp_path, dtype=None, max_shard_bytes=5000)
    assert most <= 6
    assert len(set(written.files.values())) == 8
    assert all(file.stat().st_size < 5000 + 1000 for file in tmp_path.glob("*.safetensors"))
    check_weights(tmp_path, written)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 3000, "c": 10}
    written = write_weights(
        ((name, torch.ones(size)) for name, size in sizes.items()), tmp_path, dtype=None, max_shard_bytes=5000
    )
    assert len({written.files[name] for name in sizes}) == 3


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    limit=st.integers(8, 400),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, dtype: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{number}": torch.randn(size, generator=generator) for number, size in enumerate(sizes)}
    tensors["flags"] = torch.tensor([True, False])
    written = write_weights(tensors.items(), folder, dtype=dtype, max_shard_bytes=limit)
    check_weights(folder, written)
    found = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    assert written.parameters == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (torch.zeros(0), r"tensor x is empty \(shape \(0,\)\)"),
        (torch.zeros(4, 0), "tensor x is empty"),
        (torch.tensor([1.0, float("nan"), float("inf")]), "tensor x holds 2 values"),
        (torch.tensor([1e6, 70000.0]), "tensor x holds 2 values"),  # beyond float16
    ],
)
def test_broken_tensors_are_refused(tmp_path: Path, broken: torch.Tensor, message: str) -> None:
    with pytest.raises(VerificationFailed, match=message):
        write_weights([("good", torch.ones(2)), ("x", broken)], tmp_path, dtype=torch.float16)


def test_a_file_that_lacks_a_tensor_is_found(tmp_path: Path) -> None:
    written = write_weights([("a", torch.ones(2)), ("b", torch.ones(2))], tmp_path, dtype=None)
    written.digests["c"] = digest(torch.ones(1))
    with pytest.raises(VerificationFailed, match="tensor c was lost or added"):
        check_weights(tmp_path, written)


def test_digest_tells_dtype_and_shape_apart() -> None:
    assert digest(torch.zeros(4)) != digest(torch.zeros(2, 2))
    assert digest(torch.zeros(4, dtype=torch.float16)) != digest(torch.zeros(4, dtype=torch.bfloat16))
    assert digest(torch.ones(4)) == digest(torch.ones(4))


def test_experts_are_published_one_by_one(tmp_path: Path) -> None:
    """transformers joins a mixture's experts into one tensor; other engines read what the hub holds."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    write_weights(_as_published(model, model.named_parameters()), tmp_path, dtype=None)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in load_file(tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rows = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(input_ids=rows).logits, model(input_ids=rows).logits)
