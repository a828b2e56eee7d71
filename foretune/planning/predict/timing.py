"""Time of one optimizer step in closed form, in seconds.

Workload × Strategy × Cluster ──▶ compute + memory-bound + communication + offload + optimizer, per rank

Compute: 2 FLOP a multiplied parameter and token forward, 4 backward (2 where the weights are frozen), 2 more where a
layer is recomputed (Kaplan et al. 2020, §2.1), plus attention. Pointwise work moves the activations a few times through
memory. Collectives move their volume (N-1)/N over the narrowest link (Thakur et al. 2005, ring). Constants carry their
measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from foretune.artifacts import Cluster
from foretune.planning.predict.activations import activation_bytes_per_token_layer, is_compiled
from foretune.planning.predict.memory import reduced_at_step, sums_apart
from foretune.planning.strategy import Strategy, Workload

#: Of the data sheet's peak, what a large 16-bit matmul reaches: 784 of 989 TFLOP/s on an H100 (8192³).
MATMUL_SHARE = 0.79
#: Of the peak, what causal flash attention reaches forward and backward: 49 ms for 20 TFLOP on an H100.
ATTENTION_SHARE = 0.42
#: The same with a mask: another kernel, and no product is left out, not even above the diagonal.
MASKED_ATTENTION_SHARE = 0.25
#: fp32 matmuls against the 16-bit peak: torch does them without tensor cores unless TF32 is allowed.
FP32_GPU_SHARE = 1 / 8
#: bf16 on a CPU that has no instructions for it, against fp32.
EMULATED_BF16_SLOWDOWN = 20.0
#: Times that saved activations pass through memory in a step: written, read back, their gradients once each way, and
#: the values between the eager kernels of norms and rotary embeddings that nobody saves.
ACTIVATION_PASSES = 6.0
#: The same where layers are compiled: pointwise chains are one kernel.
COMPILED_PASSES = 4.0
#: Times that LoRA's products pass a linear's input and both its outputs: 14.6k tokens/s at 7B on an H100, not 18.5k.
ADAPTER_PASSES = 6.0
#: Times that a logit passes through memory, in bytes: 6 × 4 eager; compiled, written, read twice and multiplied twice.
LOGIT_BYTES, COMPILED_LOGIT_BYTES = 24.0, 12.0
#: Bytes of memory traffic per trained parameter in a fused Adam step with its casts, norm, clipping and ZeRO's copies.
OPTIMIZER_BYTES = 80.0
#: Seconds per layer and micro-batch below which Python and kernel launches are the limit (forward and backward, eager):
#: 24 layers of a 0.5B model took 0.12 s on an H100 whose work was half of that.
LAUNCH_SECONDS = {"cuda": 4.5e-3, "cpu": 1.5e-3}
#: The same, compiled: one call a layer each way.
COMPILED_LAUNCH_SECONDS = 1.5e-3
#: What LoRA's small modules add: 0.36 s a micro-batch at 24 layers of the 0.5B shape, where full training takes 0.22.
ADAPTER_LAUNCH_SECONDS = 10e-3
#: The same where ZeRO-3 fetches and releases the parameters of every module, and what LoRA's many small modules add:
#: 0.54 s a micro-batch at 24 layers, 1.16 s with LoRA, however little there is to compute.
ZERO_3_LAUNCH_SECONDS = 17e-3
ZERO_3_ADAPTER_LAUNCH_SECONDS = 27e-3
#: Of a gradient's way into ZeRO's buckets at stages 1 and 2, Python and copies: 290 tensors added 0.05 s.
HOOK_SECONDS = 1.5e-4
#: ZeRO's Python at every optimizer step.
ZERO_STEP_SECONDS = 0.02
#: CPU Adam (fused, all cores): trained parameters per second and core; 7.6e9 take 4-5 s on 16 cores at 70 %.
CPU_ADAM_PER_CORE = 75e6
#: Seconds to start one collective.
COLLECTIVE_LATENCY = {"cuda": 3e-5, "cpu": 1e-3}


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


def flops_per_row(work: Workload, checkpointed_layers: int = 0) -> float:
    """FLOP of one row, forward and backward, recomputation included."""
    shape = work.shape
    share = checkpointed_layers / shape.num_layers
    factor = (4.0 if work.frozen else 6.0) + 2.0 * share
    layers = factor * (shape.matmul_parameters - shape.vocab_size * shape.hidden_size)
    head = (4.0 if work.frozen else 6.0) * shape.vocab_size * shape.hidden_size
    adapters = 6.0 * work.trainable if work.frozen else 0.0
    return work.row_length * (layers + head + adapters)


def attention_flops_per_row(work: Workload, checkpointed_layers: int = 0) -> float:
    """FLOP of causal attention in one row: q · length per token, layer and product; two forward, five backward.

    Kernels that know where documents end see a document; with a mask, every product of the row is computed.
    """
    shape = work.shape
    width = shape.num_attention_heads * shape.head_dim
    passes = 7.0 + 2.0 * checkpointed_layers / shape.num_layers
    length = work.row_length
    if work.packing:
        length = work.document_length if work.attention == "packed" else 2.0 * work.row_length
    return work.row_length * passes * shape.num_layers * width * length


def step_time(work: Workload, strategy: Strategy, cluster: Cluster) -> StepTime:
    """Predict one optimizer step on one rank (all ranks do the same)."""
    accelerator = cluster.accelerator
    rows = strategy.micro_batch_size * strategy.accumulation_steps
    rate = _matmul_rate(work, cluster)
    masked = work.packing and work.attention != "packed"
    attention_rate = rate * (MASKED_ATTENTION_SHARE if masked else ATTENTION_SHARE) / MATMUL_SHARE
    compute = rows * flops_per_row(work, strategy.checkpointed_layers) / rate
    compute += rows * attention_flops_per_row(work, strategy.checkpointed_layers) / attention_rate
    memory_bound = _traffic(work, strategy, cluster) / accelerator.memory_bandwidth
    compute = max(compute, _launches(work, strategy, cluster) - memory_bound)
    offload, optimizer = _update(work, strategy, cluster)
    time = StepTime(compute, memory_bound, _communication(work, strategy, cluster), offload, optimizer)
    return time.scaled(work.pace[strategy.zero_stage == 3])


def _traffic(work: Workload, strategy: Strategy, cluster: Cluster) -> float:
    """Bytes that pass through a device's memory outside of matmuls and the optimizer."""
    shape, b, compiled = work.shape, work.parameter_bytes, is_compiled(work, strategy)
    tokens = strategy.micro_batch_size * strategy.accumulation_steps * work.row_length
    recomputed = 1.0 + 0.5 * strategy.checkpointed_layers / shape.num_layers
    saved = activation_bytes_per_token_layer(work, compiled=compiled) * shape.num_layers
    traffic = (COMPILED_PASSES if compiled else ACTIVATION_PASSES) * recomputed * tokens * saved
    if work.lora_rank:
        ends = sum(linear.copies * (linear.inputs + 2 * linear.outputs) for linear in shape.linears)
        traffic += ADAPTER_PASSES * shape.num_layers * recomputed * tokens * b * ends
    # Gradients of a micro-batch are read, and their sum is read and written, by whoever owns it.
    owned = work.trainable / (cluster.world_size if strategy.zero_stage >= 2 else 1)
    traffic += (strategy.accumulation_steps - 1) * (b + 2 * work.gradient_bytes) * owned
    traffic += tokens * (COMPILED_LOGIT_BYTES if compiled else LOGIT_BYTES) * shape.vocab_size
    if not work.lora_rank and shape.plain_head:
        # With every chunk of the loss the head's fp32 gradient is read and written, a product written and read.
        chunks = strategy.accumulation_steps * ceil(
            strategy.micro_batch_size * work.max_length / strategy.loss_chunk_tokens
        )
        traffic += chunks * (8 + 2 * b) * shape.vocab_size * shape.hidden_size
    return traffic


def _launches(work: Workload, strategy: Strategy, cluster: Cluster) -> float:
    """Seconds below which a step cannot be, however little there is to compute: Python, kernel launches, hooks."""
    kind, layers = cluster.accelerator.kind, work.shape.num_layers
    per_layer = COMPILED_LAUNCH_SECONDS if is_compiled(work, strategy) else LAUNCH_SECONDS[kind]
    if strategy.zero_stage == 3:
        per_layer += ZERO_3_LAUNCH_SECONDS + (ZERO_3_ADAPTER_LAUNCH_SECONDS if work.lora_rank else 0.0)
    elif work.lora_rank and kind == "cuda":
        per_layer += ADAPTER_LAUNCH_SECONDS
    recomputed = 1.0 + 0.5 * strategy.checkpointed_layers / layers
    return per_layer * strategy.accumulation_steps * layers * recomputed


def _matmul_rate(work: Workload, cluster: Cluster) -> float:
    """FLOP per second that large matmuls reach in the workload's precision."""
    accelerator = cluster.accelerator
    rate = MATMUL_SHARE * accelerator.peak_flops
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


def _update(work: Workload, strategy: Strategy, cluster: Cluster) -> tuple[float, float]:
    """(offload, optimizer): seconds on the host's link and in the host's Adam, and of the step on the device."""
    accelerator = cluster.accelerator
    stage = strategy.zero_stage
    shard = work.trainable / (cluster.world_size if stage else 1)
    if accelerator.kind == "cpu":
        return 0.0, shard * OPTIMIZER_BYTES / accelerator.memory_bandwidth + 1e-3
    moved = strategy.offload_optimizer * shard
    on_device = (shard - moved) * OPTIMIZER_BYTES / accelerator.memory_bandwidth + (ZERO_STEP_SECONDS if stage else 0.0)
    if stage in (1, 2) and not sums_apart(work, strategy):
        tensors = work.shape.num_layers * (
            2 * len(work.shape.linears) if work.lora_rank else len(work.shape.linears) + 4
        )
        on_device += HOOK_SECONDS * tensors * strategy.accumulation_steps
    cores = max(1.0, cluster.cores_per_node / cluster.devices_per_node)
    offload = moved / (CPU_ADAM_PER_CORE * cores)
    # Gradients go to the host at every micro-batch, updated weights come back once.
    offload += (
        moved * (work.gradient_bytes * strategy.accumulation_steps + work.parameter_bytes) / cluster.host_link_bandwidth
    )
    if strategy.offload_param:
        offload += (
            3
            * strategy.accumulation_steps
            * work.parameter_bytes
            * work.parameters
            / cluster.world_size
            / cluster.host_link_bandwidth
        )
    if strategy.nvme:
        offload += _nvme_seconds(work, strategy, cluster, moved)
    return offload, on_device


def _nvme_seconds(work: Workload, strategy: Strategy, cluster: Cluster, moved: float) -> float:
    """States are read and written once a step, parameters read three times a micro-batch; a node's ranks share it."""
    optimizer = 2 * strategy.state_bytes(work) * moved
    share = work.parameters / cluster.world_size if strategy.offload_param else 0.0
    parameters = 3 * strategy.accumulation_steps * work.parameter_bytes * share
    return (optimizer + parameters) * cluster.devices_per_node / cluster.disk_bandwidth
