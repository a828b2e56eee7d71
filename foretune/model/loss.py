"""Cross-entropy without whole logits: L = -Σ_t log softmax(W h_t)[y_t], in pieces of `chunk_tokens` tokens.

    hidden [N, H] ──select targets──▶ [T, H] ──chunks──▶ logits [c, V] ──▶ Σ nll (float32 or wider)
                                                          └─▶ dh, dW at once, so that no logits outlive their chunk

The forward pass already computes both gradients (they are linear in the incoming gradient), as in the Liger kernels
(Hsu et al. 2024): memory for logits is ``chunk_tokens × V`` instead of ``N × V``, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from foretune.artifacts import IGNORE_INDEX

#: A head that does more than a linear map with one of these set in its config is left to the model's own code.
_HEAD_EXTRAS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier_scale",
    "lm_head_multiplier",
)


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ nll over rows of `hidden`; see `linear_cross_entropy`."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_tokens: int,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Summed over chunks in the wide dtype: bf16 would lose the small chunks.
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            piece = hidden[start : start + chunk_tokens]
            target = labels[start : start + chunk_tokens]
            logits = F.linear(piece, weight, bias).to(wide)
            log_normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_normalizer - logits.gather(1, target[:, None])).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            gradient = torch.exp_(logits.sub_(log_normalizer))  # softmax, in the logits' own memory
            gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1.0))
            narrow = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk_tokens] = narrow @ weight
            if grad_weight is not None:
                grad_weight += narrow.T @ piece
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        ctx.save_for_backward(
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None and bias is not None else None,
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [
            gradient * grad_output.to(gradient.dtype) if gradient is not None else None
            for gradient in ctx.saved_tensors
        ]
        return (*scaled, None, None)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, *, chunk_tokens: int
) -> torch.Tensor:
    """Sum of the negative log-likelihoods of `labels` (nats).

    Args:
        hidden: last hidden states [T, H], any float dtype.
        weight: output embedding [V, H], same dtype; a frozen one costs no gradient.
        bias: [V] or None.
        labels: int64 [T], each in [0, V).
        chunk_tokens: rows whose logits exist at the same time.

    Returns:
        Scalar in float32 (float64 for float64 inputs).
    """
    result: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, chunk_tokens
    )
    return result


def attach_loss(model: Any, *, chunk_tokens: int) -> None:
    """Give a causal LM a forward that returns Σ nll when it is called with ``shift_labels``.

    ``model(input_ids=[B, L], position_ids=[B, L], shift_labels=[B, L], target_index=[T])`` then returns a scalar;
    called without `shift_labels` it is the model's own forward. `target_index` are the flat positions that have a
    target (known on the host, so that selecting them does not wait for the device).

    The output head is a linear map in nearly every family and goes through `linear_cross_entropy`; where its config
    says that it does more (soft-capping, scaling) the model's own logits are used, whole.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = core.get_output_embeddings()
    plain_head = type(head) is torch.nn.Linear and not any(_is_set(core.config, name) for name in _HEAD_EXTRAS)
    own_forward = model.forward
    if plain_head:
        _attach_to_head(head, chunk_tokens)

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        *,
        shift_labels: torch.Tensor | None = None,
        target_index: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if shift_labels is None:
            return own_forward(input_ids=input_ids, **inputs)
        labels = shift_labels.reshape(-1)
        index = target_index if target_index is not None else (labels != IGNORE_INDEX).nonzero()[:, 0]
        if not plain_head:
            logits = own_forward(input_ids=input_ids, use_cache=False, **inputs).logits
            chosen = logits.reshape(-1, logits.shape[-1])[index]
            wide = torch.promote_types(chosen.dtype, torch.float32)
            return F.cross_entropy(chosen.to(wide), labels[index], reduction="sum")
        hidden = core.get_decoder()(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        return head(hidden.reshape(-1, hidden.shape[-1])[index], labels[index])

    model.forward = MethodType(forward, model)


def _attach_to_head(head: torch.nn.Linear, chunk_tokens: int) -> None:
    """Let the head itself compute the loss: called as a module, so that ZeRO-3 gathers its weight for the call."""
    logits: Callable[[torch.Tensor], torch.Tensor] = head.forward

    def forward(self: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is None:
            return logits(hidden)
        return linear_cross_entropy(hidden, self.weight, self.bias, labels, chunk_tokens=chunk_tokens)

    head.forward = MethodType(forward, head)  # type: ignore[method-assign]


def _is_set(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return value not in (None, 0, 1, 1.0)
