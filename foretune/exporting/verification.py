"""The exported folder says what training said, or it is no export.

    folder ──plain transformers──▶ model ──8 fixed rows──▶ logits ──against reference.safetensors──▶ figures
                             └─▶ missing, unexpected, mismatched names
           ──plain transformers──▶ tokenizer: same vocabulary, same template

Tolerances, in units of S = the largest absolute reference logit, and of the mean Kullback-Leibler divergence, which
sees a small error that is everywhere. Measured on SmolLM2-135M and on stories260K, 8 rows of 64 tokens:

                                             fp32              bf16              fp16
    other attention kernel (SDPA, eager)     2e-6   7e-12      0.036  1.5e-3     0.003  3e-5     of S, nats
    adapter merged and rounded (stories260K) 5e-7   2e-12     0.016  8e-4
    bounds                                   1e-4   1e-6       0.0625 5e-3       0.016  5e-4
    one of 30 MLPs lost                      0.27   0.15       0.26   0.15       0.27   0.15

With the same kernels the differences are zero. What is smaller than a bf16 kernel's rounding (one damaged number) is
found by comparing bytes instead, see `foretune.exporting.weights`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foretune.errors import VerificationFailed
from foretune.model.scoring import fitting_device


@dataclass(frozen=True)
class Bounds:
    """Largest difference of a logit: `relative` x S + `absolute`. Largest mean KL divergence: `divergence` nats."""

    relative: float
    absolute: float
    divergence: float


BOUNDS = {
    "fp32": Bounds(relative=1e-4, absolute=1e-4, divergence=1e-6),
    "bf16": Bounds(relative=2**-4, absolute=2**-6, divergence=5e-3),
    "fp16": Bounds(relative=2**-6, absolute=2**-9, divergence=5e-4),
}


@dataclass(frozen=True)
class LogitCheck:
    """What the comparison gave: largest absolute difference of a logit and mean KL(training ‖ export) in nats."""

    max_difference: float
    tolerance: float
    divergence: float
    divergence_tolerance: float


def load_and_check(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load an exported folder with plain transformers. Raises `VerificationFailed` if a name does not fit."""
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise VerificationFailed(
            f"export: transformers cannot load it: {' '.join(str(error).split())[:300]}"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(str(name) for name in report.get(kind) or ())
        if names:
            what = kind.replace("_", " ")
            raise VerificationFailed(f"export: {len(names)} {what} when loaded, the first is {names[0]}")
    empty = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
    if empty:
        raise VerificationFailed(f"export: tensor {empty[0]} is empty when loaded")
    return model


def check_logits(model: Any, reference: Path, *, precision: str) -> LogitCheck:
    """Compare a model's logits with those that the training engine wrote before it ended.

    Args:
        model: any causal LM; it is run where it fits, and left there.
        reference: ``input_ids``, ``attention_mask`` int64 [8, T]; ``positions`` int64 [8, P]; ``logits`` float32
            [8, P, V].

    Raises:
        VerificationFailed: a difference beyond the tolerance; the message gives both figures.
    """
    from safetensors.torch import load_file

    bounds = BOUNDS[precision]
    rows = load_file(reference)
    expected, found = rows["logits"].double(), _logits_at(model, rows).double()
    if expected.shape != found.shape:
        raise VerificationFailed(f"export: logits have shape {tuple(found.shape)}, training's {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    tolerance = bounds.relative * float(expected.abs().max()) + bounds.absolute
    log_expected, log_found = expected.log_softmax(-1), found.log_softmax(-1)
    divergence = float((log_expected.exp() * (log_expected - log_found)).sum(-1).mean())
    if not difference <= tolerance:  # written so that NaN fails
        raise VerificationFailed(
            f"export: its logits differ from training's by up to {difference:.3g} (tolerance {tolerance:.3g})"
        )
    if not divergence <= bounds.divergence:
        raise VerificationFailed(
            f"export: its predictions diverge from training's by {divergence:.3g} nats on average "
            f"(tolerance {bounds.divergence:.3g})"
        )
    return LogitCheck(difference, tolerance, max(divergence, 0.0), bounds.divergence)


def check_tokenizer(
    folder: Path, trained_with: Path, *, embedding_rows: int, trust_remote_code: bool = False
) -> str | None:
    """The export's tokenizer is the one of training; returns the sha256 of its chat template, None if it has none."""
    from transformers import AutoTokenizer

    exported, original = (
        AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code) for path in (folder, trained_with)
    )
    if exported.get_vocab() != original.get_vocab():
        raise VerificationFailed("export: its vocabulary is not the one that training used")
    if exported.chat_template != original.chat_template:
        raise VerificationFailed("export: its chat template is not the one that training used")
    highest = max(exported.get_vocab().values())
    if highest >= embedding_rows:
        raise VerificationFailed(f"export: token {highest} has no row in an embedding of {embedding_rows}")
    template = exported.chat_template
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None


def _logits_at(model: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the reference's positions, float32 on the CPU. Row by row: those of a large vocabulary are large."""
    device = fitting_device(model)
    model.to(device)
    model.eval()
    found = []
    with torch.inference_mode():
        for ids, mask, positions in zip(rows["input_ids"], rows["attention_mask"], rows["positions"], strict=True):
            length = int(mask.sum())  # padding is on the right
            logits = model(input_ids=ids[None, :length].to(device), use_cache=False).logits[0]
            found.append(logits[positions.to(device)].float().cpu())
    return torch.stack(found)
