"""Packed, document-isolated attention: the flash kernels behind `torch.nn.attention.varlen`, for any family.

    position_ids [B, L] ──document_bounds (host)──▶ cu_seq_lens int32 [D + 1], max_length
    q, k, v [B, heads, L, d] ──one row of B·L tokens──▶ attention inside each document only ──▶ [B, L, heads, d]

It is registered with transformers' attention interface, which hands the bounds from the model's forward to every layer.
Called without bounds (evaluation, probes, generation) the same name is SDPA with transformers' own masks. So a packed
micro-batch builds no [B, 1, L, L] mask and asks the device nothing; the cost of a row is the sum of its documents'.

The kernels are torch's own (`aten::_flash_attention_forward`, the same that `varlen_attn` calls; named here because its
signature changed with every release since 2.10). CUDA, 16 bits, head sizes that are multiples of 8 up to 256. Where all
documents of a micro-batch happen to have one length (whole rows of a long text), a batch of them goes to cuDNN's kernel
for Hopper and later: 1.6 ms a layer instead of 2.7 on an H100 (12 heads of 128, 4 rows of 4096). Where FlashAttention-4
is installed, its kernels are faster than both (`foretune.model.flash_attention_4`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foretune.model import flash_attention_4

#: The name under which transformers knows it.
PACKED_ATTENTION = "foretune_packed"
#: What the attention layers are handed: names that transformers' models pass on to their attention.
BOUNDS, LONGEST = "cu_seq_lens_q", "max_length_q"
LARGEST_HEAD = 256
#: What cuDNN's kernels take, and the first devices on which they are faster.
_LARGEST_CUDNN_HEAD, _HOPPER = 128, (9, 0)


def document_bounds(position_ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
    """Where documents begin in the rows laid end to end, and the length of the longest.

    Args:
        position_ids: [B, L]; 0 at the start of every document (and of the padding, which is one more document).

    Returns:
        ``(bounds, longest)``: int32 [D + 1] from 0 to B·L, and max(diff(bounds)).
    """
    flat = position_ids.reshape(-1)
    starts = np.flatnonzero(flat == 0)
    assert flat[0] == 0, "a row begins with a document"
    bounds = np.append(starts, flat.size).astype(np.int32)
    return bounds, int(np.diff(bounds).max())


def refusal(model: Any, *, device: torch.device) -> str | None:
    """Why this model cannot use packed attention here; None if it can."""
    config = model.config.get_text_config()
    if device.type != "cuda":
        return "the packed attention kernels are CUDA's"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"the packed attention kernels compute in 16 bits, not {model.dtype}"
    if not (getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)):
        return f"{type(model).__name__} does not go through transformers' attention interface"
    heads = getattr(config, "num_attention_heads", 0) or 1
    sizes = {getattr(config, "head_dim", None) or config.hidden_size // heads}
    sizes |= {getattr(config, name) for name in ("global_head_dim", "v_head_dim") if getattr(config, name, None)}
    if len(sizes) > 1 or any(size > LARGEST_HEAD or size % 8 for size in sizes):
        return f"heads of {', '.join(map(str, sorted(sizes)))} are not for the packed attention kernels"
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None):
            return f"{name} is not in the packed attention kernels"
    model_dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    return "dropout inside attention is not in the packed attention kernels" if model_dropout else None


def use_packed_attention(model: Any) -> None:
    """Let every attention layer of a transformers model (adapted or not) take document bounds."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **inputs: Any,
    ) -> tuple[torch.Tensor, None]:
        bounds = inputs.get(BOUNDS)
        if bounds is None:
            if sliding_window is not None:
                inputs["sliding_window"] = sliding_window
            output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **inputs)
            return output, None
        assert not inputs.get("dropout"), "refused when the model was built"
        window = -1 if sliding_window is None else sliding_window - 1
        return packed_attention(query, key, value, bounds, inputs[LONGEST], scale=scaling, window=window), None

    AttentionInterface.register(PACKED_ATTENTION, forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    core.set_attn_implementation(PACKED_ATTENTION)


def takes_bounds(model: Any) -> bool:
    """Whether `use_packed_attention` was called on this model."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(core.config, "_attn_implementation", None) == PACKED_ATTENTION


def packed_inputs(bounds: torch.Tensor, longest: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model's forward is given beside the tokens.

    The mask is a placeholder: transformers hands a 4D mask on as it is and builds none of its own, for which it would
    ask the device whether the row is packed.
    """
    import torch._dynamo

    # Compiled layers take any number of documents from the first on.
    torch._dynamo.maybe_mark_dynamic(bounds, 0)
    placeholder = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=bounds.device)
    return {
        "attention_mask": placeholder,
        BOUNDS: bounds,
        LONGEST: longest,
        "cu_seq_lens_k": bounds,
        "max_length_k": longest,
    }


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: torch.Tensor,
    *,
    scale: float | None = None,
    window: int = -1,
) -> torch.Tensor:
    """Causal attention inside each document.

    Args:
        query: [B, heads, L, d]; key, value: [B, key-value heads, L, d], heads a multiple of them.
        bounds: int32 [D + 1], where documents begin in the B·L tokens.
        longest: int64 [], on the CPU, so that compiled code need not be made again for another length.
        scale: of the products, 1/sqrt(d) if None. window: how many earlier tokens are seen, -1 for all.

    Returns:
        [B, L, heads, d], as transformers' attention functions return it.
    """
    batch, _, length, _ = query.shape
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    output: torch.Tensor = _forward_op(*rows, bounds, longest, scale, window)[0]
    return output.view(batch, length, *output.shape[1:])


@torch.library.custom_op(
    "foretune::packed_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor bounds, Tensor longest, float? scale, int window)"
    " -> (Tensor, Tensor)",
)
def _forward_op(  # noqa: PLR0917 (operators take positions)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: torch.Tensor,
    scale: float | None,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over tokens [T, heads, d]; returns the output and the log-sum-exp [heads, T] that backward needs."""
    most = int(longest)  # on the CPU: waits for nothing
    if flash_attention_4.takes(query):
        return flash_attention_4.forward(query, key, value, bounds, most, scale, window)
    if _are_one_batch(query, bounds, most, window):
        return _batch_forward(query, key, value, most, scale)
    output, log_normalizer, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, most, most, 0.0, window < 0, False,
        scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip
    return output, log_normalizer


@_forward_op.register_fake
def _forward_shapes(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (query.shape[1], query.shape[0])
    return torch.empty_like(query), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "foretune::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor output, Tensor log_normalizer,"
    " Tensor bounds, Tensor longest, float? scale, int window) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(  # noqa: PLR0917 (operators take positions)
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_normalizer: torch.Tensor,
    bounds: torch.Tensor,
    longest: torch.Tensor,
    scale: float | None,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    most = int(longest)
    if flash_attention_4.takes(query):
        inputs = (query, key, value, output, log_normalizer, bounds, most, scale, window)
        return flash_attention_4.backward(gradient, *inputs)
    if _are_one_batch(query, bounds, most, window):
        return _batch_backward(gradient, query, key, value, output, log_normalizer, most, scale)
    # The state of dropout's random numbers, of which there is none.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, device=query.device)
    d_query, d_key, d_value = torch.ops.aten._flash_attention_backward(
        gradient.contiguous(), query, key, value, output, log_normalizer, bounds, bounds, most, most, 0.0,
        window < 0, state, unused, scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip
    return d_query, d_key, d_value


@_backward_op.register_fake
def _backward_shapes(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _are_one_batch(query: torch.Tensor, bounds: torch.Tensor, most: int, window: int) -> bool:
    """Whether the documents are all of one length, and cuDNN is the faster for them. Known on the host.

    cuDNN's backward pass adds in any order, so not where determinism is asked for; torch's flash kernel then keeps one.
    """
    one_length = (bounds.numel() - 1) * most == query.shape[0]
    return (
        one_length
        and window < 0
        and query.shape[-1] <= _LARGEST_CUDNN_HEAD
        and torch.cuda.get_device_capability(query.device) >= _HOPPER
        and torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        and not torch.are_deterministic_algorithms_enabled()
    )


def _as_batch(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """[T, heads, d] as [T / length, heads, length, d]."""
    return tensor.view(-1, length, *tensor.shape[1:]).transpose(1, 2)


def _batch_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    output, log_normalizer, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(_as_batch(tensor, length) for tensor in (query, key, value)), None, True, 0.0, True, False, scale=scale
    )
    # [B, heads, L, 1] as the flash kernels have it: [heads, B·L].
    flat = log_normalizer.squeeze(-1).transpose(0, 1).reshape(query.shape[1], -1)
    return output.transpose(1, 2).reshape(query.shape), flat.contiguous()


def _batch_backward(  # noqa: PLR0917 (operators take positions)
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_normalizer: torch.Tensor,
    length: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = query.shape[1]
    batched = log_normalizer.view(heads, -1, length).transpose(0, 1).contiguous().unsqueeze(-1)
    seed = torch.zeros((), dtype=torch.int64, device=query.device)  # of dropout, of which there is none
    d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _as_batch(gradient.contiguous(), length), *(_as_batch(tensor, length) for tensor in (query, key, value)),
        _as_batch(output, length), batched, seed, seed, None, None, None, length, length, 0.0, True, scale=scale,
    )  # fmt: skip
    pairs = ((d_query, query), (d_key, key), (d_value, value))
    rows = [found.transpose(1, 2).reshape(like.shape).contiguous() for found, like in pairs]
    return rows[0], rows[1], rows[2]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, bounds, longest, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, bounds, longest)


def _differentiate(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return (*_backward_op(gradient, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None, None)


_forward_op.register_autograd(_differentiate, setup_context=_remember)

#: The operators whose outputs a layer that recomputes may keep, so that attention is not computed again.
OUTPUTS = (torch.ops.foretune.packed_attention.default,)
