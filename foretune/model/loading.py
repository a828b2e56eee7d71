"""From a Hugging Face folder to a module that is ready to train.

folder ──config, dropout──▶ weights or random ──checkpointed layers──▶ module

Used by training (inside the engine's partitioned loading at stage 3), evaluation and export.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.utils.checkpoint

from foretune.errors import UserError
from foretune.model.layers import decoder_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the model's configuration. Raises `UserError` if there is none that transformers knows."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _model_error(folder, error) from error


def override_dropout(config: Any, dropout: float | Literal["model"]) -> dict[str, float]:
    """Set every dropout probability of a configuration; return those that were changed, with their old values."""
    if dropout == "model":
        return {}
    changed: dict[str, float] = {}
    for name, value in list(vars(config).items()):
        is_probability = isinstance(value, float | int) and not isinstance(value, bool)
        if is_probability and ("dropout" in name or name.endswith("pdrop")) and value != dropout:
            changed[name] = float(value)
            setattr(config, name, dropout)
    return changed


def load_model(
    folder: Path,
    *,
    config: Any = None,
    precision: str,
    from_scratch: bool = False,
    draw_on: torch.device | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    attention: str | None = None,
) -> Any:
    """Load a causal LM in the given precision, on the CPU (or partitioned, inside the engine's context).

    Args:
        folder: Hugging Face folder with safetensors.
        config: its configuration if it was changed after reading.
        precision: one of `DTYPES`.
        from_scratch: random weights in the model's shape, the same on every rank for the same seed.
        draw_on: where random weights are drawn and stay; None: the CPU, which takes 43 s for half a billion in bf16.
            Each kind of device draws other numbers.
        attention: transformers' name of the attention implementation; None takes SDPA where the model has it.

    Raises:
        UserError: missing, unreadable or incomplete weights; an architecture that transformers does not know.
    """
    from transformers import AutoModelForCausalLM

    config = config if config is not None else load_config(folder, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": DTYPES[precision], "trust_remote_code": trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    torch.manual_seed(seed)
    try:
        if from_scratch:
            with draw_on or nullcontext():
                return AutoModelForCausalLM.from_config(config, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), config=config, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _model_error(folder, error) from error
    missing = sorted(set(report["missing_keys"]))
    if missing:
        raise UserError(
            "model",
            str(folder),
            f"lacks {len(missing)} weights, for example {missing[0]}; they would have been random",
            "use a complete model folder, or --from-scratch to train from random weights",
        )
    return model


def import_model_class(folder: Path) -> None:
    """Import what `load_model` will need for this folder, and load nothing. A folder it can't read is left to that."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        _ = AutoModelForCausalLM._model_mapping[type(config)]
    except (OSError, ValueError, KeyError):
        return


def checkpoint_layers(model: Any, count: int) -> None:
    """Let the first `count` decoder layers recompute their activations in backward (Chen et al. 2016).

    How many, not all or none: each costs one more forward pass of itself and frees its activations.
    """
    layers = decoder_layers(model)
    if count and not layers:
        raise UserError(
            "plan.checkpointed_layers",
            count,
            f"{type(model).__name__} cannot recompute layers",
            "set plan.checkpointed_layers to 0",
        )
    recompute = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = recompute


def _model_error(folder: Path, error: Exception) -> UserError:
    text = " ".join(str(error).split())[:300]
    if "trust_remote_code" in text:
        return UserError(
            "trust_remote_code",
            False,
            f"the model in {folder} brings its own code",
            "read that code, then add --trust-remote-code",
        )
    return UserError(
        "model",
        str(folder),
        f"transformers cannot load it: {text}",
        "check that the folder is a complete causal language model",
    )
