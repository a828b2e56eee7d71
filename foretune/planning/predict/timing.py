"""Time of one optimizer step in closed form, in seconds.

Workload × Strategy × Cluster ──▶ compute + memory-bound + communication + offload + optimizer, per rank

Compute: 2 FLOP a multiplied parameter and token forward, 4 backward (2 where the weights are frozen), 2 more where a
layer is recomputed (Kaplan et al. 2020, §2.1), plus attention. Pointwise work moves bytes through memory: counted for
layers as their family wrote them (`eager`), the saved activations a few times where they are compiled. A micro-batch
takes what the device needs, or what the host needs to start it all, whichever is more. Collectives move their volume
(N-1)/N over the narrowest link (Thakur et al. 2005, ring). Constants carry their measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from foretune.artifacts import Cluster
from foretune.model.shape import ModelShape
from foretune.planning.predict.activations import (
    activation_bytes_per_token_layer,
    is_compiled,
    makes_again,
    recomputes_inside,
)
from foretune.planning.predict.eager import eager_costs
from foretune.planning.predict.memory import reduced_at_step
from foretune.planning.predict.updating import bandwidth, update_seconds
from foretune.planning.strategy import Strategy, Workload, fuses_mlp, sums_apart, sums_inside

#: The constants that carry "fitted" were fitted to 23 runs of the 0.5B, 1.5B, GPT-2 and GPT-2 XL shapes on one H100
#: (`bench/plan_accuracy.py`, its calibration half); the other half judges them.
#: Of the data sheet's peak, what matmuls reach in training: 784 of 989 TFLOP/s alone, 715 in a row of 1.5B layers.
MATMUL_SHARE = 0.76
#: The same where layers are compiled: with little between products the card slows down (profile of a 1.5B step: 0.705).
COMPILED_MATMUL_SHARE = 0.73
#: Of the peak, what an MLP's products reach with SwiGLU inside; elements of i a token and layer that SwiGLU moves apart
#: from them, and bytes per logit, that QuACK's kernels save (profiles of a 1.5B step on an H100, with and without).
FUSED_MLP_SHARE, SWIGLU_ELEMENTS, SAVED_LOGIT_BYTES = 0.692, 5.4, 2.4
#: Causal attention, both ways, by kernel and kind of documents: what it reaches of the peak over long ones, and the
#: length in tokens at which it reaches half of that. From layers alone on an H100, documents of 200, 700 and 4096
#: tokens on average (docs/speed.md), and for FlashAttention-4 from steps of rows of 32k and 64k: 0.63.
ATTENTION_SHARES = {
    ("torch", "any"): (0.36, 1500.0),
    ("torch", "equal"): (0.58, 950.0),  # cuDNN's kernel
    ("FlashAttention-4", "any"): (0.64, 1900.0),
    ("FlashAttention-4", "equal"): (0.64, 950.0),
}
#: With a mask: another kernel, and no product is left out, not even above the diagonal.
MASKED_ATTENTION_SHARE = 0.25
#: fp32 matmuls against the 16-bit peak: torch does them without tensor cores unless TF32 is allowed.
FP32_GPU_SHARE = 1 / 8
#: bf16 on a CPU that has no instructions for it, against fp32.
EMULATED_BF16_SLOWDOWN = 20.0
#: Times that a compiled layer's saved activations pass through memory: written, read, and their gradients (fitted).
COMPILED_PASSES = 3.2
#: Bytes of memory traffic per logit (fitted): eager, some ten kernels in fp32; compiled, written, read twice, written.
LOGIT_BYTES, COMPILED_LOGIT_BYTES = 40.0, 8.9
#: Bytes that a dispatched adapter moves for each element of its linear's input and output where it is not fused.
ADAPTER_INPUT_BYTES, ADAPTER_OUTPUT_BYTES = 6.0, 12.0
#: The same of a compiled layer (7B, H100: a ninth of a step's kernels are products of rank 16 and what is added to).
COMPILED_ADAPTER_BYTES = 4.9
#: Bytes that a linear map in 8-bit floats moves for each element of its input and output, beside products at twice the
#: rate: casts, and the search for the largest (fitted to one run: 3B, layers recomputed, 1.30 s where bf16 has 1.60).
FLOAT8_CAST_BYTES = 4.4
#: Host's seconds for a call that torch dispatches, Python above it included (fitted; CPU: no launch).
CALL_SECONDS = {"cuda": 1.8e-5, "cpu": 7e-6}
#: Of a compiled layer, both ways (fitted).
COMPILED_LAYER_SECONDS = 1.7e-3
#: Of an adapted linear, both ways (fitted).
ADAPTER_SECONDS = 4e-4
#: Of a gradient on its way into DeepSpeed's sums, a tensor and micro-batch, below stage 3 (fitted): ZeRO-1 with fp32
#: sums; buckets of ZeRO 1 and 2; stage 0 in 16 bits, which steps on tensor after tensor.
SUM_SECONDS, BUCKET_SECONDS, UNFUSED_SECONDS = 9e-5, 2.6e-4, 4.6e-4
#: Calls that buckets need to add a gradient to those of the micro-batches before: a cast, a sum.
ADDING_CALLS = 2
#: Of a parameter at ZeRO-3, both ways (fitted): fetched and released, or kept whole and only asked for.
FETCH_SECONDS, KEPT_SECONDS = 1.7e-3, 1.4e-3
#: Of a micro-batch outside of the layers: DeepSpeed's Python (fitted).
MICRO_BATCH_SECONDS = {"cuda": 0.010, "cpu": 1e-3}
#: What a recomputed layer adds to calls, and to the parameters that ZeRO-3 fetches: one more forward pass.
RECOMPUTED_CALLS, RECOMPUTED_FETCHES = 1 / 3, 1 / 2
#: Calls of one tile of an MLP: forward, forward again, backward, sums.
TILE_CALLS = 50
#: How closely the device's and the host's time overlap: the larger of both, and more where they are close.
OVERLAP = 8.0
#: Seconds to start one collective.
COLLECTIVE_LATENCY = {"cuda": 3e-5, "cpu": 1e-3}
#: A strategy whose layers keep what backward needs.
_NOTHING_AGAIN = Strategy(0, 1, 1)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what they are spent on."""

    compute: float
    memory_bound: float
    communication: float
    offload: float
    optimizer: float

    @property
    def parts(self) -> dict[str, float]:
        """By name, those that take time."""
        return {name: seconds for name, seconds in vars(self).items() if seconds}

    def scaled(self, factor: float) -> StepTime:
        """Every part times a factor: what this machine was measured to take against what is computed here."""
        return StepTime(*(factor * seconds for seconds in vars(self).values()))

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.memory_bound + self.communication + self.offload + self.optimizer


def flops_per_row(work: Workload, strategy: Strategy = _NOTHING_AGAIN) -> float:
    """FLOP of one row's products with weights, forward and backward, what recomputed layers do again included.

    Inside a compiled backward that is all but the MLP's last product, unless a norm reads what it gives.
    """
    head = work.shape.vocab_size * work.shape.hidden_size
    adapters = 6.0 * work.trainable if work.frozen else 0.0
    return _layer_flops_per_row(work, strategy) + work.row_length * (_passes(work) * head + adapters)


def _passes(work: Workload) -> float:
    """FLOP of a multiplied parameter and token: forward, its input's gradient, and its own unless it is frozen."""
    return 4.0 if work.frozen else 6.0


def _layer_flops_per_row(work: Workload, strategy: Strategy) -> float:
    """What of `flops_per_row` is in the layers' own linear maps."""
    shape = work.shape
    layers = shape.matmul_parameters - shape.vocab_size * shape.hidden_size
    again = layers / shape.num_layers
    if recomputes_inside(work, strategy) and not shape.saved.mlp_read:
        i, h = shape.intermediate_size, shape.hidden_size
        again -= sum(one.copies * i * h for one in shape.linears if (one.inputs, one.outputs) == (i, h))
    return work.row_length * (_passes(work) * layers + 2.0 * strategy.checkpointed_layers * again)


def _mlp_flops_per_row(work: Workload, strategy: Strategy) -> float:
    """What of it is in the MLPs."""
    passes = _passes(work) * work.shape.num_layers + 2.0 * strategy.checkpointed_layers
    return work.row_length * passes * work.shape.mlp_parameters


def attention_flops_per_row(work: Workload, strategy: Strategy = _NOTHING_AGAIN) -> float:
    """FLOP of causal attention in one row: q · length per token, layer and product; two forward, five backward.

    Kernels that know where documents end see a document; with a mask, every product of the row is computed. Layers that
    recompute do the two of forward again, unless they keep the output.
    """
    shape = work.shape
    width = shape.num_attention_heads * shape.head_dim
    passes = 7.0 + (0.0 if strategy.keep_attention else 2.0 * strategy.checkpointed_layers / shape.num_layers)
    length = work.row_length
    if work.packing:
        length = work.document_length if work.attention == "packed" else 2.0 * work.row_length
    return work.row_length * passes * shape.num_layers * width * length


def _tiled_flops_per_row(work: Workload, strategy: Strategy) -> float:
    """FLOP of MLPs in tiles beyond those of whole ones: forward once more, in backward."""
    return 2.0 * work.row_length * work.shape.num_layers * work.shape.mlp_parameters if strategy.mlp_tile_rows else 0.0


def step_time(work: Workload, strategy: Strategy, cluster: Cluster) -> StepTime:
    """Predict one optimizer step on one rank (all ranks do the same)."""
    rows = strategy.micro_batch_size * strategy.accumulation_steps
    peak = _peak_rate(work, cluster)
    rate = peak * (COMPILED_MATMUL_SHARE if is_compiled(work, strategy) else MATMUL_SHARE)
    compute = rows * flops_per_row(work, strategy) / rate
    if work.fp8:
        compute -= rows * _layer_flops_per_row(work, strategy) / 2 / rate
    if fuses_mlp(work, strategy):
        inside = rows * _mlp_flops_per_row(work, strategy)
        compute += inside / (FUSED_MLP_SHARE * peak) - inside / rate
    attention_rate = peak * _attention_share(work)
    compute += rows * _tiled_flops_per_row(work, strategy) / rate
    compute += rows * attention_flops_per_row(work, strategy) / attention_rate
    memory_bound = _traffic(work, strategy, cluster) / bandwidth(cluster)
    device, host = compute + memory_bound, _host_seconds(work, strategy, cluster)
    larger = max(device, host)
    compute += larger * ((device / larger) ** OVERLAP + (host / larger) ** OVERLAP) ** (1 / OVERLAP) - device
    offload, optimizer = update_seconds(work, strategy, cluster)
    time = StepTime(compute, memory_bound, _communication(work, strategy, cluster), offload, optimizer)
    return time.scaled(work.pace[strategy.zero_stage == 3])


def _attention_share(work: Workload) -> float:
    if work.packing and work.attention != "packed":
        return MASKED_ATTENTION_SHARE
    kernel = "FlashAttention-4" if work.flash_attention_4 and work.attention == "packed" else "torch"
    share, half = ATTENTION_SHARES[kernel, "equal" if work.equal_documents or not work.packing else "any"]
    return share * work.document_length / (work.document_length + half)


def _traffic(work: Workload, strategy: Strategy, cluster: Cluster) -> float:
    """Bytes that pass through a device's memory outside of matmuls and the optimizer."""
    shape, b, compiled = work.shape, work.parameter_bytes, is_compiled(work, strategy)
    tokens = strategy.micro_batch_size * strategy.accumulation_steps * work.row_length
    share = strategy.checkpointed_layers / shape.num_layers
    both_ends = sum(one.copies * (one.inputs + one.outputs) for one in shape.linears)
    if compiled:
        fused = fuses_mlp(work, strategy)
        kept = activation_bytes_per_token_layer(work, compiled=True, tiled=strategy.mlp_tile_rows > 0)
        per_layer = COMPILED_PASSES * (1.0 + share / 2) * kept
        if work.lora_rank:
            per_layer += COMPILED_ADAPTER_BYTES * (1.0 + share / 3) * both_ends  # a third is forward
        elif makes_again(work, strategy):
            product = 0 if fused else shape.intermediate_size  # a fused MLP makes it again inside a product
            per_layer += b * (product + shape.saved.made_again * shape.hidden_size)
        if fused:
            per_layer -= (1.0 + share / 3) * b * SWIGLU_ELEMENTS * shape.intermediate_size
    else:
        # A third of it is forward, which is what is done again.
        per_layer = (1.0 + 0.3 * share) * b / 2 * eager_costs(shape).bytes_per_token(shape, work.row_length)
        if work.lora_rank and not _fuses_adapters(work, strategy):
            ends = ADAPTER_INPUT_BYTES, ADAPTER_OUTPUT_BYTES
            per_layer += sum(one.copies * (ends[0] * one.inputs + ends[1] * one.outputs) for one in shape.linears)
    if work.fp8:
        per_layer += (1.0 + share / 3) * FLOAT8_CAST_BYTES * both_ends
    traffic = tokens * shape.num_layers * (per_layer + _tile_traffic(work, strategy))
    # Gradients of a micro-batch are read, and their sum is read and written, by whoever owns it.
    owned = work.trainable / (cluster.world_size if strategy.zero_stage >= 2 else 1)
    inside = sums_inside(work, strategy)
    if inside:  # what is left are norms and biases
        owned -= shape.num_layers * sum(linear.copies * linear.inputs * linear.outputs for linear in shape.linears)
        ends = shape.plain_embedding, shape.plain_head
        tables = int(all(ends)) if shape.tied else sum(ends)  # whose gradients autograd does not make
        owned -= shape.vocab_size * shape.hidden_size * tables
    traffic += (strategy.accumulation_steps - 1) * (b + 2 * work.gradient_bytes) * owned
    per_logit = COMPILED_LOGIT_BYTES if compiled else LOGIT_BYTES
    if compiled and work.softmax_in_place:
        per_logit -= SAVED_LOGIT_BYTES
    traffic += tokens * per_logit * shape.vocab_size
    if not work.lora_rank and shape.plain_head:
        # With every chunk of the loss the head's fp32 gradient is read and written.
        chunks = strategy.accumulation_steps * ceil(
            strategy.micro_batch_size * work.max_length / strategy.loss_chunk_tokens
        )
        traffic += chunks * (8 if inside else 8 + b) * shape.vocab_size * shape.hidden_size
    return traffic


def _tile_traffic(work: Workload, strategy: Strategy) -> float:
    """Bytes a token and layer that MLPs in tiles move more: they are not compiled, and sum their gradients in fp32."""
    if not strategy.mlp_tile_rows:
        return 0.0
    shape, b = work.shape, work.parameter_bytes
    pointwise = b / 2 * eager_costs(shape).inner * shape.intermediate_size
    again = 1 / 3 + (1.0 + strategy.checkpointed_layers / shape.num_layers / 3 if is_compiled(work, strategy) else 0.0)
    sums = 0.0 if work.lora_rank else (8 + b) * shape.mlp_parameters / strategy.mlp_tile_rows
    return again * pointwise + sums


def _fuses_adapters(work: Workload, strategy: Strategy) -> bool:
    """Whether LoRA's products are one function (`foretune.model.lora`): torch's linears, whole weights."""
    return strategy.zero_stage < 3 and work.shape.family != "gpt2"


def _host_seconds(work: Workload, strategy: Strategy, cluster: Cluster) -> float:
    """Seconds that a rank's host needs to start a step's work: Python, dispatch, DeepSpeed's hooks."""
    kind, shape, stage = cluster.accelerator.kind, work.shape, strategy.zero_stage
    share = strategy.checkpointed_layers / shape.num_layers
    calls = eager_costs(shape).calls * CALL_SECONDS[kind]
    linears = sum(linear.copies for linear in shape.linears)
    per_layer = COMPILED_LAYER_SECONDS if is_compiled(work, strategy) else calls
    if work.lora_rank and kind == "cuda":
        per_layer += ADAPTER_SECONDS * linears
    per_layer *= 1.0 + RECOMPUTED_CALLS * share
    if strategy.mlp_tile_rows:
        tiles = ceil(strategy.micro_batch_size * work.row_length / strategy.mlp_tile_rows)
        per_layer += TILE_CALLS * CALL_SECONDS[kind] * tiles
    if kind == "cuda":
        small = sum(linear.copies for linear in shape.linears if linear.bias) + _norm_tensors(shape)
        adapters = 2 * linears if work.lora_rank else 0
        trained = adapters or linears + small
        if stage == 3:
            fetching = FETCH_SECONDS * linears + KEPT_SECONDS * (small + adapters)
            per_layer += fetching * (1.0 + RECOMPUTED_FETCHES * share)
        elif stage == 0:
            per_layer += UNFUSED_SECONDS * trained
        elif sums_apart(work, strategy):
            per_layer += SUM_SECONDS * trained
        else:
            later = 1.0 - 1.0 / strategy.accumulation_steps
            per_layer += (BUCKET_SECONDS + ADDING_CALLS * CALL_SECONDS[kind] * later) * trained
    return strategy.accumulation_steps * (shape.num_layers * per_layer + MICRO_BATCH_SECONDS[kind])


def _norm_tensors(shape: ModelShape) -> int:
    """Parameters of a layer's norms, counted as tensors: their elements over the hidden size, those of heads as two."""
    return round(shape.layer_norm_parameters / shape.hidden_size) + (2 if shape.saved.qk_norm else 0)


def _peak_rate(work: Workload, cluster: Cluster) -> float:
    """FLOP per second of the data sheet in the workload's precision."""
    accelerator = cluster.accelerator
    rate = accelerator.peak_flops
    if accelerator.kind == "cuda":
        return rate * (FP32_GPU_SHARE if work.precision == "fp32" else 1.0)
    return rate / EMULATED_BF16_SLOWDOWN if work.precision != "fp32" and not accelerator.bf16 else rate


def _communication(work: Workload, strategy: Strategy, cluster: Cluster) -> float:
    """Collectives of one step. Stages 0 and 1 (on CPUs 2) reduce once a step, stages 2 and 3 at every micro-batch."""
    ranks = cluster.world_size
    if ranks == 1:
        return 0.0
    link = cluster.link_bandwidth if cluster.nodes == 1 else min(cluster.link_bandwidth, cluster.network_bandwidth)
    share = (ranks - 1) / ranks
    b, steps, stage = work.parameter_bytes, strategy.accumulation_steps, strategy.zero_stage
    gradients = b * work.trainable * share
    if stage == 0:
        volume, collectives = 2 * gradients, 1
    elif stage == 1:
        volume, collectives = 2 * gradients + gradients, 2  # all-reduce, then the updated weights are gathered
    elif reduced_at_step(work, strategy, cluster):
        volume, collectives = gradients + gradients, 2
    elif stage == 2:
        volume, collectives = steps * gradients + gradients, steps + 1
    else:
        # Gathered in forward and again in backward, and the gradients scattered, at every micro-batch.
        volume = steps * (2 * b * work.parameters * share + gradients)
        collectives = steps * 3 * work.shape.num_layers
    return volume / link + collectives * COLLECTIVE_LATENCY[cluster.accelerator.kind]
