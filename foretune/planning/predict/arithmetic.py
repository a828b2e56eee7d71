"""The arithmetic of a device's peak, symbol by symbol: formula = numbers = bytes. Its lines add up to the prediction.

ψ parameters, ψt trained ones, N ranks, b bytes of a parameter in forward, a of a summed gradient, s of master and
states; T tokens of a micro-batch, l tokens of a row, L layers, k of them checkpointed, h hidden size, i inner size,
q and kv widths of queries and of keys, V vocabulary, c tokens of a chunk of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator

from foretune.artifacts import Cluster, Derivation
from foretune.planning.predict import activations, memory
from foretune.planning.strategy import Strategy, Workload, fuses_mlp, sums_apart, sums_inside

ZERO = "Rajbhandari et al. 2020, ZeRO, §3 and §5"
CHECKPOINTING = "Chen et al. 2016"
MEASURED = "measured"


def derivations(work: Workload, strategy: Strategy, cluster: Cluster) -> list[Derivation]:
    """Every line of the peak, in the order of its parts."""
    device = memory.device_memory(work, strategy, cluster)
    lines: list[Derivation] = []
    for part, size in device.parts.items():
        of_part = [line for line in _lines(part, device.phase, work, strategy, cluster) if line.value]
        rest = size - sum(line.value for line in of_part)
        if rest:  # a part without a formula of its own, or rounding
            of_part.append(
                Derivation(part=part, formula="as measured", numbers=f"{rest:,}", value=rest, source=MEASURED)
            )
        lines += of_part
    return lines


def _lines(part: str, phase: str, work: Workload, strategy: Strategy, cluster: Cluster) -> Iterator[Derivation]:
    if part in ("parameters", "optimizer"):
        yield from _states(part, phase, work, strategy, cluster)
    elif part == "gradients":
        yield from _gradients(phase, work, strategy, cluster)
    elif part == "activations":
        yield from _activations(phase, work, strategy, cluster)
    elif part == "loss":
        yield from _loss(phase, work, strategy)
    elif part == "buffers":
        yield from _buffers(phase, work, strategy, cluster)
    elif part == "step":
        yield from _step(work, strategy, cluster)
    elif part == "context":
        yield _constant(part, memory.CUDA_CONTEXT_BYTES, "CUDA context, cuBLAS, kernels of one process: measured")
        if cluster.world_size > 1:
            yield _constant(part, memory.NCCL_BYTES, "NCCL's channels: measured")
    elif part == "process":
        yield _constant(part, memory.PROCESS_BYTES, "Python with torch, transformers, deepspeed: measured")
    elif part == "allocator":
        parts = memory.device_memory(work, strategy, cluster).parts
        rest = sum(size for name, size in parts.items() if name not in ("allocator", "process"))
        yield Derivation(
            part=part,
            formula="kept · everything but the process",
            numbers=f"{memory.MALLOC_SHARE} · {rest:,}",
            value=parts[part],
            source="what malloc keeps of freed blocks: measured",
        )


def _constant(part: str, value: int, source: str) -> Derivation:
    return Derivation(part=part, formula="constant", numbers=f"{value / 2**30:.2f} GiB", value=value, source=source)


def _step(work: Workload, strategy: Strategy, cluster: Cluster) -> Iterator[Derivation]:
    """The optimizer step's own bytes: which of its terms they are is found by their size."""
    size = memory.step_bytes(work, strategy, cluster)
    shard = memory.shard_of(work, strategy, cluster)
    tile = min(shard, strategy.sub_group_size)
    stays = 1 - strategy.offload_optimizer
    ranks, vocabulary, h = cluster.world_size, work.shape.vocab_size, work.shape.hidden_size
    over = f" / {ranks}" if ranks > 1 and strategy.zero_stage else ""
    per_rank = " / N" if over else ""
    kept = f" · {stays:.1f}" if 0 < stays < 1 else ""
    not_offloaded = " · (1 - offloaded)" if kept else ""
    piece, wide = min(memory.EIGHT_BIT_PIECE, shard), memory.EIGHT_BIT_STEP_BYTES
    choices = [
        (wide * piece, f"{wide}·piece", f"{wide} · {piece:,}", "what is fp32 of the 8-bit states at a time"),
        (8 * work.trainable, "8·ψt", f"8 · {work.trainable:,}", "gradients in fp32, twice"),
        (8 * vocabulary * h // ranks, "8·V·h" + per_rank, f"8 · {vocabulary:,} · {h}{over}", "fp64 copy for the norm"),
        (8 * min(vocabulary * h, shard), "8·V·h", f"8 · {vocabulary:,} · {h}", "fp64 copy for the norm"),
        (4 * tile, "4·sub-group", f"4 · {tile:,}", "fp32 gradients of a sub-group"),
        (6 * tile, "6·sub-group", f"6 · {tile:,}", "gradients of a sub-group in two formats"),
        *(
            (int(n * shard * stays), f"{n}·ψt{per_rank}{not_offloaded}", f"{n} · {work.trainable:,}{over}{kept}", what)
            for n, what in ((4, "gradients in fp32"), (6, "gradients in two formats"), (2, "gradients in bf16"))
        ),
    ]
    for value, formula, numbers, source in choices:
        if value == size:
            yield Derivation(part="step", formula=formula, numbers=numbers, value=size, source=source)
            return


def _states(part: str, phase: str, work: Workload, strategy: Strategy, cluster: Cluster) -> Iterator[Derivation]:
    held = memory.phases(work, strategy, cluster)[phase][part]
    ranks, stage, b = cluster.world_size, strategy.zero_stage, work.parameter_bytes
    if part == "parameters":
        divided = stage == 3 and ranks > 1
        formula = "b·ψ / N" if divided else "b·ψ"
        numbers = f"{b} · {work.parameters:,}" + (f" / {ranks}" if divided else "")
        yield Derivation(part=part, formula=formula, numbers=numbers, value=held, source=ZERO)
        return
    size = strategy.state_bytes(work) if stage or b < 4 else work.optimizer_state_bytes
    formula, numbers = "s·ψt", f"{size:g} · {work.trainable:,}"
    if stage and ranks > 1:
        formula, numbers = formula + " / N", numbers + f" / {ranks}"
    if 0 < strategy.offload_optimizer < 1:
        formula, numbers = formula + " · (1 - offloaded)", numbers + f" · {1 - strategy.offload_optimizer:.2g}"
    yield Derivation(part=part, formula=formula, numbers=numbers, value=held, source=ZERO)


def _gradients(phase: str, work: Workload, strategy: Strategy, cluster: Cluster) -> Iterator[Derivation]:
    size = memory.phases(work, strategy, cluster)[phase]["gradients"]
    a, b, trained, ranks = work.gradient_bytes, work.parameter_bytes, work.trainable, cluster.world_size
    widest = work.shape.vocab_size * work.shape.hidden_size
    tokens = strategy.micro_batch_size * work.max_length
    choices = [
        (a * trained, "a·ψt", f"{a} · {trained:,}"),
        (b * trained, "b·ψt", f"{b} · {trained:,}"),
        ((a + b) * trained, "(a + b)·ψt", f"({a} + {b}) · {trained:,}"),
        (a * -(-trained // ranks), "a·ψt / N", f"{a} · {trained:,} / {ranks}"),
    ]
    if 0 < strategy.offload_optimizer < 1:
        kept = int(a * -(-trained // ranks) * (1.0 - strategy.offload_optimizer))
        numbers = f"{a} · {trained:,} / {ranks} · {1 - strategy.offload_optimizer:.1f}"
        choices.append((kept, "a·ψt / N · (1 - offloaded)", numbers))
    extras = [
        (0, "", ""),
        (b * widest, " + b·V·h", f" + {b} · {work.shape.vocab_size:,} · {work.shape.hidden_size}"),
        (2 * b * widest, " + 2b·V·h", f" + 2 · {b} · {work.shape.vocab_size:,} · {work.shape.hidden_size}"),
        (b * trained, " + b·ψt", f" + {b} · {trained:,}"),
        (8 * tokens * work.shape.hidden_size, " + 8·T·h", f" + 8 · {tokens:,} · {work.shape.hidden_size}"),
    ]
    for value, formula, numbers in choices:
        for more, added, figures in extras:
            if value + more == size:
                yield Derivation(
                    part="gradients", formula=formula + added, numbers=numbers + figures, value=size, source=ZERO
                )
                return


def _activations(phase: str, work: Workload, strategy: Strategy, cluster: Cluster) -> Iterator[Derivation]:
    shape, b = work.shape, work.parameter_bytes
    tokens, kept = strategy.micro_batch_size * work.max_length, strategy.checkpointed_layers
    compiled, tile = activations.is_compiled(work, strategy), strategy.mlp_tile_rows
    saved = activations.layer_bytes_per_token(work, strategy)
    recomputing = phase == "recomputation" or (phase == "end of backward" and kept > 0)
    inside = activations.working_bytes_per_token(work, strategy, recomputing=recomputing)
    again, fused = activations.makes_again(work, strategy), fuses_mlp(work, strategy)
    kinds = {"compiled": compiled, "MLPs in tiles": tile, "pointwise values made again": again, "fused MLPs": fused}
    kind = ", ".join([shape.family, *(name for name, is_so in kinds.items() if is_so)])
    what = f"A = {saved:,} bytes a token and layer that autograd saves ({kind})"

    def line(formula: str, numbers: str, value: int, source: str = "") -> Derivation:
        return Derivation(part="activations", formula=formula, numbers=numbers, value=value, source=source)

    inner, outer = activations.working_widths(work, strategy, recomputing=recomputing)
    formula = f"T·b·({inner}i {'+' if outer > 0 else '-'} {abs(outer)}h)" if inner else f"T·b·{outer}h"
    within = [line(formula, f"{tokens:,} · {inside:,}", tokens * inside, "gradients inside one layer's backward")]
    if tile:
        size = activations.tile_bytes(work, strategy)
        within.append(line("tile", f"{tile:,} rows", size, "a tile's inner values, sums of its weights' gradients"))
    if phase == "end of backward":
        yield line("T·A", f"{tokens:,} · {saved:,}", tokens * saved, what)
        yield from within
        return
    many = "k"
    if phase == "recomputation":  # as if all layers did (`memory.phases`)
        many, kept = "L", shape.num_layers
    layers = shape.num_layers - kept
    yield line("T·(L - k)·A", f"{tokens:,} · {layers} · {saved:,}", tokens * layers * saved, what)
    if kept:
        inputs = tokens * kept * b * shape.hidden_size
        yield line(f"T·{many}·b·h", f"{tokens:,} · {kept} · {b} · {shape.hidden_size}", inputs, CHECKPOINTING)
        if strategy.keep_attention:
            output = activations.attention_output_bytes_per_token(work)
            of_attention = "attention's output in layers that recompute"
            yield line(f"T·{many}·(bq + …)", f"{tokens:,} · {kept} · {output:,}", tokens * kept * output, of_attention)
    around, gone = activations.around_bytes_per_token(work), memory.freed_by_last_norm(work, strategy, cluster)
    if phase == "recomputation" and gone:
        around -= activations.last_norm_bytes_per_token(work)
        yield line("T·(2·b·d + …)", f"{tokens:,} · {around:,}", tokens * around, "rotary tables, ids, labels")
    else:
        whole = tokens * around
        yield line("T·((4 + 2b)·h + …)", f"{tokens:,} · {around:,}", whole, "last norm, rotary tables, ids, labels")
    if mask := activations.mask_bytes(work, strategy):
        yield line(
            "rows·l²", f"{strategy.micro_batch_size} · {work.max_length}²", mask, "boolean mask of packed documents"
        )
    if phase == "recomputation":
        yield line("T·A", f"{tokens:,} · {saved:,}", tokens * saved, f"one layer recomputed; {what}")
    if phase in ("backward", "recomputation"):
        yield from within


def _loss(phase: str, work: Workload, strategy: Strategy) -> Iterator[Derivation]:
    shape, b = work.shape, work.parameter_bytes
    tokens, vocabulary, h = strategy.micro_batch_size * work.max_length, shape.vocab_size, shape.hidden_size

    def line(formula: str, numbers: str, value: int, source: str) -> Derivation:
        return Derivation(part="loss", formula=formula, numbers=numbers, value=value, source=source)

    summed = sums_inside(work, strategy)
    head = activations.own_head_gradient(work, summed=summed)
    if not shape.plain_head:
        per_logit = 14 if phase == "loss" else 6
        numbers = f"{per_logit} · {tokens:,} · {vocabulary:,}"
        yield line(f"{per_logit}·T·V", numbers, per_logit * tokens * vocabulary, "whole logits in several formats")
        return
    if phase in ("backward", "recomputation"):
        value = activations.head_gradient_bytes(work, strategy, summed=summed)
        if head:
            yield line("b·(V + T)·h + …", f"{b} · ({vocabulary:,} + {tokens:,}) · {h}", value, "of head and hidden")
        else:
            yield line("b·T·h + …", f"{b} · {tokens:,} · {h}", value, "gradient of the hidden states, as it is scaled")
        return
    per_logit, chunk = activations.logit_bytes(work, strategy), min(strategy.loss_chunk_tokens, tokens)
    added = activations.added_bytes_per_logit(work, strategy)
    if per_logit * chunk * vocabulary + 4 * head < added * chunk * vocabulary + (4 + b) * head:
        per_logit = added
        if head:
            yield line("b·V·h", f"{b} · {vocabulary:,} · {h}", b * head, "a chunk's share of the head's gradient")
    numbers = f"{per_logit} · {chunk:,} · {vocabulary:,}"
    yield line(f"{per_logit}·c·V", numbers, per_logit * chunk * vocabulary, "logits of a chunk and their gradient")
    if head:
        yield line("4·V·h", f"4 · {vocabulary:,} · {h}", 4 * head, "the head's gradient, summed in fp32")
    yield line("b·T·h", f"{b} · {tokens:,} · {h}", b * tokens * h, "gradient of the hidden states")


def _buffers(phase: str, work: Workload, strategy: Strategy, cluster: Cluster) -> Iterator[Derivation]:
    persistent, passing = memory.buffer_bytes(work, strategy, cluster)
    b, bucket = work.parameter_bytes, strategy.reduce_bucket_size

    def line(formula: str, numbers: str, value: int, source: str) -> Derivation:
        return Derivation(part="buffers", formula=formula, numbers=numbers, value=value, source=source)

    if strategy.streamed:
        slots, size = memory.STREAMED_SLOTS, strategy.state_bytes(work)
        numbers = f"{slots} · {size:g} · {int(persistent / (slots * size)):,}"
        yield line(
            f"{slots}·s·piece", numbers, persistent, "streamed states on their way up, in use, on their way down"
        )
    elif persistent and strategy.zero_stage == 3:
        yield line("b·bucket", f"{b} · {bucket:,}", persistent, "reduce bucket of ZeRO-3, which stays")
    elif persistent:
        yield line("b·widest", f"{b} · {persistent // b:,}", persistent, "a gradient on its way to the host")
    if phase == "step":
        return
    if gathered := memory.gathered_bytes(work, strategy, cluster.world_size):
        yield line("b·gathered", f"{b} · {gathered // b:,}", gathered, "parameters gathered at a time, and ahead")
    if passing and phase in ("backward", "recomputation", "end of backward"):
        copies = passing // (b * bucket)
        yield line(f"{copies}·b·bucket", f"{copies} · {b} · {bucket:,}", passing, "buckets on their way")
    at_once = memory.reduced_at_once(work, strategy, cluster)
    if at_once and phase == "end of backward":
        size = work.gradient_bytes if sums_apart(work, strategy) else b
        yield line("a·min(ψt, 5e8)", f"{size} · {at_once // size:,}", at_once, "flat copy that is reduced at once")
