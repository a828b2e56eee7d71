"""Low-rank adapters (Hu et al. 2021), by peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from foretune.config.schema import LoraConfig
from foretune.errors import UserError


def add_adapters(model: Any, lora: LoraConfig, *, seed: int) -> Any:
    """Freeze `model` and put an adapter beside each targeted layer.

    Adapters are made in float32 only when the model is: otherwise they take its dtype, and the optimizer keeps the
    float32 master. B starts at zero, so the first forward pass is the base model's; A's start is seeded, equal on
    every rank.

    Raises:
        UserError: no layer of that name exists.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets: Any = lora.target_modules
    config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=_stores_weights_transposed(model),
    )
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(
            "lora.target_modules",
            targets,
            " ".join(str(error).split())[:200],
            "name layers that the model has, or use all-linear",
        ) from None
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable, "peft made no trainable parameter"
    return adapted


def save_adapter_config(model: Any, folder: Path) -> None:
    """Write peft's ``adapter_config.json`` (how to read the adapter's weights) into `folder`."""
    config = model.peft_config["default"]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode


def _stores_weights_transposed(model: Any) -> bool:
    """GPT-2's Conv1D keeps [in, out] where nn.Linear keeps [out, in]; peft wants to be told."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def restore_adapters(model: Any, folder: Path) -> Any:
    """Wrap `model` with adapters of the shape that ``adapter_config.json`` in `folder` describes; their weights are
    still to be loaded. They take the model's dtype, as in training."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # the parameters stay what they were in training: trainable
    with quiet_peft():
        return get_peft_model(model, config, autocast_adapter_dtype=False)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without peft's use of a name that transformers 5.23 has given up, which says nothing to a user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
