"""A LoRA checkpoint as peft's adapter folder, and merged into its base model.

adapter: weights of the checkpoint ──peft's names──▶ adapter_model.safetensors, adapter_config.json
merged:  W ← W + (alpha / r) B A, summed in float32 and rounded once, then an ordinary model
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from foretune.checkpoint import layout
from foretune.errors import VerificationFailed
from foretune.exporting.weights import WrittenWeights, write_weights
from foretune.model.adapters import quiet_peft

_ADAPTER_NAME = ".default"


def write_adapter(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *, checkpoint: Path, base: str
) -> WrittenWeights:
    """Write an adapter folder that ``PeftModel.from_pretrained`` reads.

    Args:
        tensors: a LoRA checkpoint's weights, named as in the peft model that was trained.
        checkpoint: holds peft's ``adapter_config.json``.
        base: hub id or folder of the model the adapter belongs to, written into the configuration.
    """
    config = json.loads((checkpoint / layout.ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    (folder / layout.ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    renamed = ((name.replace(_ADAPTER_NAME, ""), tensor) for name, tensor in tensors)
    return write_weights(
        renamed, folder, dtype=None, stem="adapter_model", max_shard_bytes=2**62
    )  # peft reads one file


def merged_model(adapted: Any) -> Any:
    """Add the adapters of a peft model to its weights and return the plain model. Works in place.

    peft's own merge rounds B A to the weights' dtype before it adds; this rounds the sum, once.
    """
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for layer in (module for module in adapted.modules() if isinstance(module, LoraLayer)):
            for part in (layer.lora_A, layer.lora_B):
                part.float()
            for name in layer.active_adapters:
                weight = layer.get_base_layer().weight
                weight.copy_(weight.float() + layer.get_delta_weight(name).float())
    return adapted.unload()


def model_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a Hugging Face folder holds of a model: parameters, tied ones once, and persistent buffers."""
    saved = set(model.state_dict())
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name in saved:
            yield name, buffer


def load_adapter(base: Any, folder: Path, written: WrittenWeights) -> Any:
    """Put an exported adapter on its base model as a user would.

    Raises:
        VerificationFailed: peft does not take a weight.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    with quiet_peft():
        model = PeftModel.from_pretrained(base, str(folder))
    taken = get_peft_model_state_dict(model)
    stored = load_file(folder / "adapter_model.safetensors")
    for name in written.digests:
        if name not in taken or not torch.equal(taken[name].to(stored[name].dtype), stored[name]):
            raise VerificationFailed(f"export: peft does not take {name} from the adapter")
    return model
