"""The parts of a transformers model that are replaced or wrapped, whatever its family names them."""

from __future__ import annotations

from typing import Any

import torch


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def linear_maps(model: Any) -> list[torch.nn.Linear]:
    """The plain linear maps inside the decoder layers, each once; those of another class are left to it."""
    found = [module for layer in decoder_layers(model) for module in layer.modules() if type(module) is torch.nn.Linear]
    return list(dict.fromkeys(found))
