"""Activations and the loss: what a micro-batch keeps for backward. Bytes; T tokens of a micro-batch, V vocabulary.

layers: saved tensors, or inputs where a layer recomputes itself    around them: last norm, positions, ids
loss:   one chunk of logits in several formats, the head's gradient, the gradient of the hidden states
"""

from __future__ import annotations

from foretune.planning.strategy import Strategy, Workload, fuses_mlp

#: Rows of a gradient that the loss widens at a time to scale them (`foretune.model.loss`).
SCALED_ROWS = 1 << 14
#: Elements of i that a compiled MLP keeps, by those of the eager one: products are made again from what went in.
_COMPILED_MLP = {5: 2, 4: 3}


def is_compiled(work: Workload, strategy: Strategy) -> bool:
    """Whether the layers run compiled: never at stage 3, which fetches the parameters of every module as it runs."""
    return work.compiled and strategy.zero_stage < 3


def activation_bytes_per_token_layer(
    work: Workload, *, compiled: bool = False, tiled: bool = False, again: bool = False, fused_mlp: bool = False
) -> int:
    """What one layer keeps for backward, per token: the tensors that autograd saves of Hugging Face's own layers.

    A Llama layer, b bytes an element: two RMS norms compute in fp32 and keep their input (4h), its normalised value for
    the weight's gradient (bh, not where that weight is frozen) and their output, which the linears read (bh); attention
    keeps rotated queries and its output (2bq), rotated keys and values (2bk), 4 bytes of log-sum-exp a head; the gated
    MLP keeps gate, its activation, up and their product (4bi). Other families: `foretune.model.families.Saved`.

    Packed documents need a mask, unless the attention kernel knows where they end. With one, keys and values are
    repeated for every query head, and each layer keeps the mask in the elements' type (bT). Without a fused kernel
    whole scores are kept (8 bytes a head and position).

    Compiled layers keep what a minimal cut through their graph crosses (torch's partitioner, measured per family): one
    of two fp32 norm inputs, no normalised values, and gate, up and product of the MLP. Where they make pointwise values
    `again`, that product and the norms' outputs are not kept either. MLPs in tiles keep nothing inside, a
    `fused_mlp` gate and up.
    """
    shape, b, saved = work.shape, work.parameter_bytes, work.shape.saved
    h, q, k = shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    fused = not (shape.soft_capped_attention or saved.fp32_scores)
    masked = work.packing and work.attention != "packed"
    normalised = 0 if work.lora_rank or compiled else (4 if saved.wide else b)
    # In fp32 there is no cast to make one norm's input again from what the other keeps.
    wide = saved.hidden_fp32 // 2 if compiled and b < 4 else saved.hidden_fp32
    hidden = b * saved.hidden * h + 4 * wide * h + normalised * saved.norms * h
    repeated = q if (masked and fused) or shape.soft_capped_attention else k
    attention = b * (saved.queries * q + 2 * repeated + (saved.keys - 2) * k)
    if fused:
        attention += 4 * shape.num_attention_heads + (b * work.max_length if masked else 0)
    else:
        attention += (8 if shape.soft_capped_attention else 4 + b % 4) * shape.num_attention_heads * work.max_length
    if saved.fp32_scores:
        attention += 2 * (4 - b) * q  # queries and keys, also of a 16-bit model
    if saved.qk_norm:
        attention += b * (q + k) if compiled else (4 + normalised) * (q + k)
    adapters = sum(linear.copies for linear in shape.linears) * b * work.lora_rank if work.lora_rank else 0
    mlp = 0 if tiled else _COMPILED_MLP.get(saved.mlp, saved.mlp) if compiled else saved.mlp
    if again:
        hidden -= b * saved.made_again * h
        mlp -= 1
    if fused_mlp:
        mlp = 2
    return hidden + attention + b * mlp * shape.intermediate_size + adapters + 16


def working_widths(work: Workload, strategy: Strategy, *, recomputing: bool) -> tuple[int, int]:
    """(i's, h's): elements a token that a layer's backward holds beside what was saved, in widths of MLP and model.

    Gradients of the MLP's inner values and of its ends (3i + 2h), or where it is fused, those of gate and up, and their
    product; in tiles of its ends, and its output, which is made in one piece (3h). A product that is made again lies
    beside them (4i - 2h). With adapters every product has a part of rank r, which is a tensor until a kernel adds it:
    6i - h, and if gate and up are made again in backward, their parts alone are kept, two more. (These two: 7B, rank
    16, 16,384 tokens on an H100, 23.67 and 28.02 GiB. What torch's compiler allocates for a CPU says 7 and 9 i's.)
    """
    if strategy.mlp_tile_rows:
        return 0, 3
    widths = [(3, 2)]
    if makes_again(work, strategy) and not fuses_mlp(work, strategy):
        widths.append((6, -1) if work.lora_rank else (4, -2))
    inner, outer = max(widths, key=lambda one: one[0] * work.shape.intermediate_size + one[1] * work.shape.hidden_size)
    in_parts = work.lora_rank > 0 and recomputing and recomputes_inside(work, strategy)
    return inner + (2 if in_parts else 0), outer


def working_bytes_per_token(work: Workload, strategy: Strategy, *, recomputing: bool) -> int:
    """`working_widths` in bytes."""
    inner, outer = working_widths(work, strategy, recomputing=recomputing)
    return work.parameter_bytes * (inner * work.shape.intermediate_size + outer * work.shape.hidden_size)


def tile_bytes(work: Workload, strategy: Strategy) -> int:
    """What one tile of an MLP takes in backward: its inner values and their gradients, and the weights' gradients.

    Those are summed over tiles in fp32 (4), come in their own format, and are rounded to it at the end (2b).
    """
    shape, b, rows = work.shape, work.parameter_bytes, strategy.mlp_tile_rows
    if not rows:
        return 0
    weights = 0 if work.lora_rank else (4 + 2 * b) * shape.mlp_parameters
    return rows * b * (shape.saved.mlp + 3) * shape.intermediate_size + weights


def layer_bytes_per_token(work: Workload, strategy: Strategy) -> int:
    """What one layer keeps for backward as a strategy runs it."""
    compiled, tiled = is_compiled(work, strategy), strategy.mlp_tile_rows > 0
    again, fused = makes_again(work, strategy), fuses_mlp(work, strategy)
    return activation_bytes_per_token_layer(work, compiled=compiled, tiled=tiled, again=again, fused_mlp=fused)


def makes_again(work: Workload, strategy: Strategy) -> bool:
    """Whether the layers make pointwise values again in backward: compiled ones can, with whole MLPs."""
    return strategy.recompute_pointwise and is_compiled(work, strategy) and not strategy.mlp_tile_rows


def recomputes_inside(work: Workload, strategy: Strategy) -> bool:
    """Whether layers that recompute do so inside their compiled backward (`foretune.model.compilation`)."""
    return strategy.keep_attention and is_compiled(work, strategy) and not strategy.mlp_tile_rows


def attention_output_bytes_per_token(work: Workload) -> int:
    """What attention gives to one layer: its output (bq), and 4 bytes of log-sum-exp a head."""
    heads = work.shape.num_attention_heads
    return work.parameter_bytes * heads * work.shape.head_dim + 4 * heads


def checkpoint_bytes_per_token(work: Workload, strategy: Strategy) -> int:
    """What a layer that recomputes keeps: its input (bh), and attention's output where that is kept."""
    kept = attention_output_bytes_per_token(work) if strategy.keep_attention else 0
    return work.parameter_bytes * work.shape.hidden_size + kept


def activation_bytes(work: Workload, strategy: Strategy) -> int:
    """Activations of one micro-batch when forward has ended: saved tensors, what checkpointed layers keep, the ends."""
    tokens = strategy.micro_batch_size * work.max_length
    kept = strategy.checkpointed_layers
    saved = layer_bytes_per_token(work, strategy)
    layers = (work.shape.num_layers - kept) * saved + kept * checkpoint_bytes_per_token(work, strategy)
    return tokens * (layers + around_bytes_per_token(work)) + mask_bytes(work, strategy)


def around_bytes_per_token(work: Workload) -> int:
    """Around the layers: the last norm, cosines and sines, four integers."""
    return last_norm_bytes_per_token(work) + 2 * work.parameter_bytes * work.shape.head_dim + 4 * 8


def last_norm_bytes_per_token(work: Workload) -> int:
    """The last norm: what it keeps as in a layer (4 + b), and its output (b)."""
    return (4 + 2 * work.parameter_bytes) * work.shape.hidden_size


def mask_bytes(work: Workload, strategy: Strategy) -> int:
    """One boolean mask for all layers, where documents share rows and the attention kernel does not know their ends."""
    masked = work.packing and work.attention != "packed"
    return strategy.micro_batch_size * work.max_length**2 if masked else 0


def logit_bytes(work: Workload, strategy: Strategy) -> int:
    """Bytes per logit of a chunk at the worst moment of the linear cross-entropy (`foretune.model.loss`).

    The chunk's logits (b), and of the chunk before, which is not forgotten yet, the gradient (b). Compiled: the new
    gradient (b), but by QuACK's kernel, which writes it over the logits. Otherwise logits in fp32 (4) and what the
    log-sum-exp makes of them (4). In fp32 all are one size.
    """
    b = work.parameter_bytes
    earlier = b if strategy.micro_batch_size * work.max_length > strategy.loss_chunk_tokens else 0
    if is_compiled(work, strategy):
        return (b if work.softmax_in_place else 2 * b) + earlier
    return (8 if b == 4 else 8 + b) + earlier


def added_bytes_per_logit(work: Workload, strategy: Strategy) -> int:
    """Bytes per logit of a chunk while its share of the head's gradient is added: logits and gradient, or both in one.

    In fp32 they are one, and where the softmax is computed in place.
    """
    one = work.parameter_bytes == 4 or (work.softmax_in_place and is_compiled(work, strategy))
    return work.parameter_bytes if one else 2 * work.parameter_bytes


def own_head_gradient(work: Workload, *, summed: bool) -> int:
    """Elements of the gradient that the loss keeps of the output head: none if it is frozen, or `summed` elsewhere."""
    return 0 if work.lora_rank or summed else work.shape.vocab_size * work.shape.hidden_size


def loss_bytes(work: Workload, strategy: Strategy, *, summed: bool = False) -> int:
    """Linear cross-entropy: one chunk of logits, the head's gradient, the gradient of the hidden states (bTh).

    The head's gradient is summed in fp32 (4Vh) where the head is trained, unless it goes straight to the `summed`
    gradients of the step; when a chunk's share (bVh) is added, see `added_bytes_per_logit`. A head that does more than
    multiply has whole logits (14 V bytes a token).
    """
    shape, b = work.shape, work.parameter_bytes
    tokens = strategy.micro_batch_size * work.max_length
    if not shape.plain_head:
        return 14 * shape.vocab_size * tokens
    chunk = min(strategy.loss_chunk_tokens, tokens) * shape.vocab_size
    head = own_head_gradient(work, summed=summed)
    logits, adding = (
        logit_bytes(work, strategy) * chunk + 4 * head,
        added_bytes_per_logit(work, strategy) * chunk + (4 + b) * head,
    )
    return max(logits, adding) + tokens * b * shape.hidden_size


def head_gradient_bytes(work: Workload, strategy: Strategy, *, summed: bool = False) -> int:
    """What the loss hands to backward: the gradients of hidden states and head.

    At the worst moment a few rows of the former are widened to be scaled, or the latter is rounded from its fp32 sum.
    """
    shape, b = work.shape, work.parameter_bytes
    tokens = strategy.micro_batch_size * work.max_length
    if not shape.plain_head:
        return 6 * shape.vocab_size * tokens
    head = own_head_gradient(work, summed=summed) // shape.hidden_size
    widened = 4 * max(min(tokens, SCALED_ROWS), head) if b < 4 else 0
    return (b * (tokens + head) + widened) * shape.hidden_size
