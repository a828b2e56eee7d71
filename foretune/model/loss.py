"""Cross-entropy without whole logits: L = -Σ_t log softmax(W h_t)[y_t], in pieces of `chunk_tokens` tokens.

    hidden [N, H] ──select targets──▶ [T, H] ──chunks──▶ logits [c, V] ──▶ Σ nll (float32 or wider)
                                                          └─▶ dh, dW at once, so that no logits outlive their chunk

The forward pass already computes both gradients (they are linear in the incoming gradient), as in the Liger kernels
(Hsu et al. 2024): memory for logits is ``chunk_tokens × V`` instead of ``N × V``, and nothing is computed twice.

Where the head's gradients have an fp32 sum of their own (`foretune.model.weight_sums`) and the incoming gradient is
known beforehand, dW goes there: the matrix product scales it and adds it. No dW lies in memory, is rounded, is added
again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from foretune.artifacts import IGNORE_INDEX
from foretune.model import quack_kernels
from foretune.model.attention import packed_inputs, takes_bounds
from foretune.model.weight_sums import GradientSum, add_product

#: Rows of a gradient that are widened at a time to be scaled.
_SCALED_ROWS = 1 << 14
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
        fused: bool,
        weight_sum: GradientSum | None,
        gradient_scale: float | None,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Summed over chunks in the wide dtype (bf16 would lose the small chunks), and rounded once, in backward.
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight and weight_sum is None else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
        nll_and_gradient = _fused_softmax() if fused else _softmax_in_place
        for start in range(0, hidden.shape[0], chunk_tokens):
            piece = hidden[start : start + chunk_tokens]
            target = labels[start : start + chunk_tokens]
            logits = F.linear(piece, weight, bias)
            if not (needs_hidden or needs_weight):
                total += F.cross_entropy(logits.to(wide), target, reduction="sum")
                continue
            nll, gradient = nll_and_gradient(logits, target)
            total += nll
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[start : start + chunk_tokens])
            if grad_weight is not None:
                add_product(grad_weight, gradient.T, piece)
            elif needs_weight:
                assert weight_sum is not None
                assert gradient_scale is not None
                weight_sum.add_product(gradient.T, piece, scale=gradient_scale)
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden.dtype
        ctx.promised = gradient_scale if weight_sum is not None else None
        ctx.is_spent = False
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert not ctx.is_spent, "the gradients were scaled in place: there is one backward pass"
        if ctx.promised is not None and grad_output.device.type == "cpu":  # on a GPU the host would wait for it
            assert abs(float(grad_output) - ctx.promised) <= 1e-6 * abs(ctx.promised), "another scale than was promised"
        ctx.is_spent = True
        return (*(_scaled(gradient, grad_output, ctx.dtype) for gradient in ctx.saved_tensors), *[None] * 5)


def _softmax_in_place(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ nll, its gradient in the dtype of `logits`) of logits [c, V], which are used up."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_normalizer = torch.logsumexp(wide, dim=-1, keepdim=True)
    nll = (log_normalizer - wide.gather(1, target[:, None])).sum()
    gradient = torch.exp_(wide.sub_(log_normalizer))  # softmax, in the logits' own memory
    gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1.0))
    return nll, gradient.to(logits.dtype)


def _softmax(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, written for a compiler: logits are read twice and the gradient written once, all in their own dtype.

    Maximum and sum are spelled out: torch's compiler knows the pair and takes both in one pass (online softmax,
    Milakov & Gimelshein 2018), which `logsumexp` hides from it.
    """
    wide = logits.to(torch.float32)
    highest = wide.amax(dim=-1, keepdim=True)
    log_normalizer = highest + (wide - highest).exp().sum(dim=-1, keepdim=True).log()
    nll = (log_normalizer - wide.gather(1, target[:, None])).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device)[None] == target[:, None]
    gradient = torch.exp(wide - log_normalizer) - is_target.to(torch.float32)
    return nll, gradient.to(logits.dtype)


@cache
def _compiled_softmax() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    compiled: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.compile(_softmax)
    return compiled


def _fused_softmax() -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """`_softmax` in one or two kernels, compiled once for any number of rows (the last chunk is shorter).

    Where QuACK is installed, in a kernel of its own: a row stays on the chip, so logits are read once, and the gradient
    takes their place.
    """
    import torch._dynamo

    def call(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if quack_kernels.takes(logits):
            return quack_kernels.softmax_in_place(logits, target)
        if len(target) < 2:  # compilers treat one row as another program
            return _softmax_in_place(logits, target)
        torch._dynamo.maybe_mark_dynamic(logits, 0)
        torch._dynamo.maybe_mark_dynamic(target, 0)
        return _compiled_softmax()(logits, target)

    return call


def _scaled(gradient: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """`gradient` times a wide scalar, in `dtype`; what is in that dtype is overwritten.

    In 16 bits the scalar itself would be rounded, by up to 0.4 %, so it is not.
    """
    if gradient is None:
        return None
    if gradient.dtype != dtype:
        return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
    if gradient.dtype == scale.dtype:
        return gradient.mul_(scale)
    for rows in torch.split(gradient, _SCALED_ROWS):
        rows.copy_(rows.to(scale.dtype).mul_(scale))
    return gradient


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    chunk_tokens: int,
    fused: bool = False,
    weight_sum: GradientSum | None = None,
    gradient_scale: float | None = None,
) -> torch.Tensor:
    """Sum of the negative log-likelihoods of `labels` (nats).

    Args:
        hidden: last hidden states [T, H], any float dtype.
        weight: output embedding [V, H], same dtype; a frozen one costs no gradient.
        bias: [V] or None.
        labels: int64 [T], each in [0, V).
        chunk_tokens: rows whose logits exist at the same time.
        fused: let torch compile the softmax of a chunk and its gradient (not in float64).
        weight_sum: where the weight's gradient is added in the forward pass already; the backward pass then gives none.
            It takes a `gradient_scale`.
        gradient_scale: what the result's gradient will be in the backward pass, if that is known.

    Returns:
        Scalar in float32 (float64 for float64 inputs). It can be differentiated once.
    """
    if not torch.is_grad_enabled():  # a function's forward is not told
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    into = weight_sum if gradient_scale is not None else None
    result: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, chunk_tokens, fused, into, gradient_scale
    )
    return result


def attach_loss(model: Any, *, chunk_tokens: int, fused: bool = False) -> None:
    """Give a causal LM a forward that returns Σ nll when it is called with ``shift_labels``.

    ``model(input_ids=[B, L], position_ids=[B, L], shift_labels=[B, L], target_index=[T])`` then returns a scalar;
    called without `shift_labels` it is the model's own forward. `target_index` are the flat positions that have a
    target (known on the host, so that selecting them does not wait for the device). `document_bounds` int32 [D + 1] and
    `longest_document` [] are used by a model with packed attention (see `foretune.model.attention`), else ignored.
    `gradient_scale` promises what the gradient of this scalar will be in backward, which `weight_sums.sum_inside` needs
    of the head; without it the head's gradient is autograd's.

    The output head is a linear map in nearly every family and goes through `linear_cross_entropy`; where its config
    says that it does more (soft-capping, scaling) the model's own logits are used, whole.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = core.get_output_embeddings()
    plain_head = type(head) is torch.nn.Linear and not any(_is_set(core.config, name) for name in _HEAD_EXTRAS)
    own_forward = model.forward
    if plain_head:
        _attach_to_head(head, chunk_tokens, fused=fused)

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        *,
        shift_labels: torch.Tensor | None = None,
        target_index: torch.Tensor | None = None,
        document_bounds: torch.Tensor | None = None,
        longest_document: torch.Tensor | None = None,
        gradient_scale: float | None = None,
        **inputs: Any,
    ) -> Any:
        if shift_labels is None:
            return own_forward(input_ids=input_ids, **inputs)
        if document_bounds is not None and longest_document is not None and takes_bounds(core):
            inputs |= packed_inputs(document_bounds, longest_document)
        labels = shift_labels.reshape(-1)
        index = target_index if target_index is not None else (labels != IGNORE_INDEX).nonzero()[:, 0]
        if not plain_head:
            logits = own_forward(input_ids=input_ids, use_cache=False, **inputs).logits
            chosen = logits.reshape(-1, logits.shape[-1])[index]
            wide = torch.promote_types(chosen.dtype, torch.float32)
            return F.cross_entropy(chosen.to(wide), labels[index], reduction="sum")
        hidden = core.get_decoder()(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        rows = hidden.reshape(-1, hidden.shape[-1])
        if len(index) < len(rows):  # else every token is a target
            rows, labels = rows.index_select(0, index), labels.index_select(0, index)
        return head(rows, labels, gradient_scale)

    model.forward = MethodType(forward, model)


def _attach_to_head(head: torch.nn.Linear, chunk_tokens: int, *, fused: bool) -> None:
    """Let the head itself compute the loss: called as a module, so that ZeRO-3 gathers its weight for the call."""
    logits: Callable[[torch.Tensor], torch.Tensor] = head.forward

    def forward(
        self: Any, hidden: torch.Tensor, labels: torch.Tensor | None = None, gradient_scale: float | None = None
    ) -> torch.Tensor:
        if labels is None:
            return logits(hidden)
        into = getattr(self, "gradient_sum", None)  # given by `weight_sums.sum_inside`
        return linear_cross_entropy(
            hidden, self.weight, self.bias, labels, chunk_tokens=chunk_tokens, fused=fused, weight_sum=into,
            gradient_scale=gradient_scale,
        )  # fmt: skip

    head.forward = MethodType(forward, head)  # type: ignore[method-assign]


def _is_set(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return value not in (None, 0, 1, 1.0)
