"""Memory of one rank and of one node in closed form. Bytes; ψ parameters, ψt the trained ones, N the number of ranks.

Workload × Strategy × Cluster ──▶ parts by phase ──▶ the peak, and the phase it is in

States (Rajbhandari et al. 2020, ZeRO, §3 and §5; transients measured on DeepSpeed 0.19.8 under a storage tracker),
with b bytes of a parameter in forward (2 or 4), a of an accumulated gradient, s of the optimizer's states (8 for Adam):

    stage   parameters   fp32 master + states   gradients            added while stepping
    0       bψ           (4 if b=2) ψt + sψt    bψt                  8ψt in 16 bits
    1       bψ           (4+s)ψt/N              aψt, + bψt if a≠b    4ψt/N in fp32, 6ψt/N with a=2, 0 with a=4, b=2
    2       bψ           (4+s)ψt/N              aψt/N                the same, but 0.8ψt/N with a=4, b=2
    3       bψ/N         (4+s)ψt/N              aψt/N                4·min(ψt/N, sub-group), 6 with a=2

Offloading moves master, states and gradients to the host. Activations: `activation_bytes_per_token_layer`. A
checkpointed layer keeps its input only, and recomputes itself in backward, one layer at a time (Chen et al. 2016).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from foretune.artifacts import Cluster
from foretune.planning.strategy import GIB, Strategy, Workload, buckets_for

#: CUDA context, cuBLAS workspaces and kernels of one process; several ranks have NCCL's channels on top.
CUDA_CONTEXT_BYTES = int(0.75 * GIB)
NCCL_BYTES = int(0.5 * GIB)
#: A Python process with torch, transformers and deepspeed imported, no weights.
PROCESS_BYTES = int(0.6 * GIB)
#: The same on a machine with GPUs: CUDA's libraries and pinned staging buffers.
GPU_PROCESS_BYTES = int(3.5 * GIB)
#: What malloc keeps of freed blocks on a CPU: SmolLM2-135M at ZeRO-2 grew from 2.96 to 3.29 GiB in its first steps.
MALLOC_SHARE = 0.12
#: Share of the memory that a plan may fill; the rest is for the allocator's rounding and fragments.
USABLE_SHARE = 0.92


@dataclass(frozen=True)
class DeviceMemory:
    """Peak of one rank's device, by part, and the phase in which it is reached."""

    phase: str
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def activation_bytes_per_token_layer(work: Workload) -> int:
    """What one layer keeps for backward, per token: the tensors that autograd saves of Hugging Face's own layers.

    A Llama layer, b bytes an element: two RMS norms compute in fp32 and keep their input (4h), its normalised value for
    the weight's gradient (bh, not where that weight is frozen) and their output, which the linears read (bh); attention
    keeps rotated queries and its output (2bq), rotated keys and values (2bk), 4 bytes of log-sum-exp a head; the gated
    MLP keeps gate, its activation, up and their product (4bi). Other families: `foretune.model.families.Saved`.

    Packed documents need a mask. With one, keys and values are repeated for every query head, and each layer keeps the
    mask in the elements' type (bT). Without a fused kernel whole scores are kept (8 bytes a head and position).
    """
    shape, b, saved = work.shape, work.parameter_bytes, work.shape.saved
    h, q, k = shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    fused = not (shape.soft_capped_attention or saved.fp32_scores)
    normalised = 0 if work.lora_rank else (4 if saved.wide else b)
    hidden = b * saved.hidden * h + 4 * saved.hidden_fp32 * h + normalised * saved.norms * h
    repeated = q if (work.packing and fused) or shape.soft_capped_attention else k
    attention = b * (saved.queries * q + 2 * repeated + (saved.keys - 2) * k)
    if fused:
        attention += 4 * shape.num_attention_heads + (b * work.max_length if work.packing else 0)
    else:
        attention += (8 if shape.soft_capped_attention else 4 + b % 4) * shape.num_attention_heads * work.max_length
    if saved.fp32_scores:
        attention += 2 * (4 - b) * q  # queries and keys, also of a 16-bit model
    if saved.qk_norm:
        attention += (4 + normalised) * (q + k)
    adapters = sum(linear.copies for linear in shape.linears) * b * work.lora_rank
    return hidden + attention + b * saved.mlp * shape.intermediate_size + adapters + 16


def working_bytes_per_token(work: Workload) -> int:
    """What a layer's backward holds beside what was saved: gradients of the MLP's inner values and of its ends."""
    shape = work.shape
    return work.parameter_bytes * (3 * shape.intermediate_size + 2 * shape.hidden_size)


def activation_bytes(work: Workload, strategy: Strategy) -> int:
    """Activations of one micro-batch when forward has ended: saved tensors, inputs of checkpointed layers, the ends."""
    shape, b = work.shape, work.parameter_bytes
    tokens = strategy.micro_batch_size * work.max_length
    kept = strategy.checkpointed_layers
    layers = (shape.num_layers - kept) * activation_bytes_per_token_layer(work) + kept * b * shape.hidden_size
    # The last norm as in a layer and its output, cosines and sines, ids, positions, labels and targets (int64).
    around = (4 + 2 * b) * shape.hidden_size + 2 * b * shape.head_dim + 4 * 8
    mask = strategy.micro_batch_size * work.max_length**2 if work.packing else 0  # one boolean mask for all layers
    return tokens * (layers + around) + mask


def loss_bytes(work: Workload, strategy: Strategy) -> int:
    """Linear cross-entropy of one chunk: logits and a temporary of the log-sum-exp in fp32 (8·c·V bytes).

    The head's gradient is summed in fp32 (4Vh) beside one product (bVh) where the head is trained, the gradient of the
    hidden states (bh a token) fills up. A head that does more than multiply has whole logits (14 V bytes a token).
    """
    shape, b = work.shape, work.parameter_bytes
    tokens = strategy.micro_batch_size * work.max_length
    if not shape.plain_head:
        return 14 * shape.vocab_size * tokens
    head = shape.vocab_size * shape.hidden_size
    gradient = (4 + b) * head if not work.lora_rank else 0
    return 8 * min(strategy.loss_chunk_tokens, tokens) * shape.vocab_size + gradient + tokens * b * shape.hidden_size


def _head_gradient_bytes(work: Workload, tokens: int) -> int:
    """What the loss hands to backward: the gradients of head and hidden states, and their scaled copies."""
    shape, b = work.shape, work.parameter_bytes
    if not shape.plain_head:
        return 6 * shape.vocab_size * tokens
    head = 0 if work.lora_rank else shape.vocab_size * shape.hidden_size
    return 2 * b * (head + tokens * shape.hidden_size)


def device_memory(work: Workload, strategy: Strategy, cluster: Cluster) -> DeviceMemory:
    """Peak memory of one rank's device. On a CPU the device is the rank's share of the host, so nothing leaves it."""
    by_phase = phases(work, strategy, cluster)
    worst = max(by_phase, key=lambda name: sum(by_phase[name].values()))
    return DeviceMemory(worst, {name: size for name, size in by_phase[worst].items() if size})


def phases(work: Workload, strategy: Strategy, cluster: Cluster) -> dict[str, dict[str, int]]:
    """Bytes by part, for each phase of a step that can be its peak."""
    ranks, stage, trained = cluster.world_size, strategy.zero_stage, work.trainable
    on_cpu = cluster.accelerator.kind == "cpu"
    stays = 1.0 if on_cpu else 1.0 - strategy.offload_optimizer
    shard = ceil(trained / ranks) if stage else trained
    master = 0 if stage == 0 and work.parameter_bytes == 4 else 4
    resident = {
        "parameters": work.parameter_bytes * _held_parameters(work, strategy, cluster),
        "optimizer": int(stays * (master + work.optimizer_state_bytes) * shard),
        "buffers": _buffer_bytes(work, strategy, ranks),
    }
    if on_cpu:
        resident["process"] = PROCESS_BYTES
    else:
        resident["context"] = CUDA_CONTEXT_BYTES + (NCCL_BYTES if ranks > 1 else 0)

    tokens = strategy.micro_batch_size * work.max_length
    activations = activation_bytes(work, strategy)
    layer = tokens * (activation_bytes_per_token_layer(work) + working_bytes_per_token(work))
    # The layer whose backward runs: recomputed anew, or what it had saved is counted already.
    running = layer if strategy.checkpointed_layers else tokens * working_bytes_per_token(work)
    gradients, transient = _gradient_bytes(work, strategy, shard, stays)
    earlier = _gradients_in_forward(work, strategy, gradients)
    head = _head_gradient_bytes(work, tokens)
    step = _step_bytes(work, strategy, shard, stays)
    varying = {
        "loss": {"gradients": earlier, "activations": activations, "loss": loss_bytes(work, strategy)},
        "backward": {"gradients": earlier, "activations": activations + running, "loss": head},
        "end of backward": {"gradients": gradients + transient, "activations": layer},
        "step": {"gradients": gradients, "step": step},
    }
    by_phase = {name: {**resident, **parts} for name, parts in varying.items()}
    if on_cpu:
        for parts in by_phase.values():
            parts["allocator"] = int(MALLOC_SHARE * (sum(parts.values()) - PROCESS_BYTES))
    return by_phase


def _buffer_bytes(work: Workload, strategy: Strategy, ranks: int) -> int:
    """Reduce bucket (persistent once it is filled), its copy on the way, and at stage 3 the gathered parameters.

    Several ranks need the copy: stages 1 and 2 for the collective, stage 3 once flat and once scattered.
    """
    if strategy.zero_stage == 0:
        return 0
    b, sizes = work.parameter_bytes, buckets_for(work.shape, work.trainable)
    alone = ranks == 1
    if strategy.zero_stage < 3:
        return b * sizes.reduce * (1 if alone else 2)
    gathered = 0 if alone and not strategy.offload_param else min(work.parameters, sizes.max_live + sizes.prefetch)
    return b * (sizes.reduce * (1 if alone else 3) + gathered)


def _held_parameters(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """Parameters that stay on the device between steps."""
    if strategy.zero_stage < 3:
        return work.parameters
    if strategy.offload_param and cluster.accelerator.kind != "cpu":
        return 0
    return ceil(work.parameters / cluster.world_size)


def _gradient_bytes(work: Workload, strategy: Strategy, shard: int, stays: float) -> tuple[int, int]:
    """Gradients kept on the device, and those that backward has beside them before they are reduced or added."""
    stage, trained = strategy.zero_stage, work.trainable
    b, a = work.parameter_bytes, work.gradient_bytes
    widest = work.shape.vocab_size * work.shape.hidden_size if not work.lora_rank else 0
    if stage == 0:
        return b * trained, b * widest
    if stage == 1:
        # Summed in another format than they come in, gradients exist in both, and once more while they are added.
        kept = (a + b if a != b else a) * trained
        return kept, b * trained if a != b else b * widest
    kept = int(a * shard * stays)
    if stage == 3 and not strategy.offload_optimizer:
        return kept, b * widest
    return kept, 2 * b * widest  # a tied or large embedding's gradient before it leaves for its owner


def _gradients_in_forward(work: Workload, strategy: Strategy, gradients: int) -> int:
    """Gradients that are there before the last backward begins: those of earlier micro-batches, or a standing buffer.

    With one micro-batch a step and no standing buffer, gradients grow while activations are freed: only the larger of
    both counts. ZeRO-0 writes zeros into its gradients, ZeRO-3 and the 16-bit ZeRO-1 keep a flat buffer for them.
    """
    if strategy.accumulation_steps > 1 or strategy.zero_stage in (0, 3):
        return gradients
    if strategy.zero_stage == 1 and work.gradient_bytes != work.parameter_bytes and not strategy.offload_optimizer:
        return work.gradient_bytes * work.trainable
    return 0


def _step_bytes(work: Workload, strategy: Strategy, shard: int, stays: float) -> int:
    """What the optimizer step adds."""
    b, a, stage = work.parameter_bytes, work.gradient_bytes, strategy.zero_stage
    if stage == 0:
        return 0 if b == 4 else 8 * work.trainable
    if stage == 3:
        tile = min(shard, buckets_for(work.shape, work.trainable).sub_group)
        fp32_gradients = int(4 * shard * stays) if strategy.offload_optimizer else 4 * tile
        return fp32_gradients + (2 * tile if a == 2 else 0)
    if a == 2:
        return int(6 * shard * stays)
    if b == 2:  # ZeRO-1 in bf16 steps on the fp32 buffer that it keeps
        return int(0.8 * shard * stays) if stage == 2 or work.precision == "fp16" else 0
    return int(4 * shard * stays)


def initialisation_bytes(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """Peak while the engine is built: weights, master, and a copy of the shard on its way to fp32 (10ψ at N=1)."""
    shard = ceil(work.trainable / cluster.world_size) if strategy.zero_stage else work.trainable
    return work.parameter_bytes * _held_parameters(work, strategy, cluster) + 8 * shard


def host_memory_per_node(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """Host memory of one node at its most: loading the weights, or running with what is offloaded and being saved.

    Offloading at stages 1 and 2 takes 18.4 bytes a parameter of the rank's shard (measured: device and host together
    20.4, the device 2). At stage 3: 12 bytes of the offloaded share, its fp32 gradients pinned, and the accumulated
    gradients of the whole shard pinned; pinned buffers are rounded up to a power of two by torch's host allocator.
    """
    per_node = cluster.devices_per_node
    if cluster.accelerator.kind == "cpu":
        return per_node * max(
            device_memory(work, strategy, cluster).peak, initialisation_bytes(work, strategy, cluster)
        )
    shard = ceil(work.trainable / cluster.world_size)
    group = min(shard, buckets_for(work.shape, work.trainable).sub_group) if strategy.zero_stage == 3 else shard
    # Saving copies one flat tensor at a time from the device: at stage 3 a sub-group's, else the whole shard's.
    running = GPU_PROCESS_BYTES + 4 * group
    if strategy.offload_optimizer and strategy.zero_stage < 3:
        running += int((10.4 + work.optimizer_state_bytes) * shard)
    elif strategy.offload_optimizer:
        pinned_gradients = shard / group * _power_of_two(4 * group)
        states = (4 + work.optimizer_state_bytes) * shard
        running += int(strategy.offload_optimizer * (states + pinned_gradients))
        running += _power_of_two(work.gradient_bytes * shard)
    if strategy.offload_param:
        running += _power_of_two(work.parameter_bytes * ceil(work.parameters / cluster.world_size))
    # Below stage 3 each rank reads the whole model before it goes to the device; at stage 3 weights stay mapped.
    loading = GPU_PROCESS_BYTES + (work.parameter_bytes * work.parameters if strategy.zero_stage < 3 else 0)
    return per_node * max(running, loading)


def checkpoint_bytes(work: Workload, strategy: Strategy) -> int:
    """A checkpoint on disk: the trained weights, their fp32 master where there is one, and the optimizer's states."""
    b = work.parameter_bytes
    if strategy.zero_stage == 0 and b == 4:
        return (4 + work.optimizer_state_bytes) * work.trainable
    weights = 0 if strategy.zero_stage == 3 else b
    return (weights + 4 + work.optimizer_state_bytes) * work.trainable


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def budget(cluster: Cluster) -> int:
    """Bytes of a device that a plan may fill."""
    return int(USABLE_SHARE * cluster.accelerator.memory_bytes)


def host_budget(cluster: Cluster) -> int:
    """Bytes of a node's host memory that a plan may fill."""
    return int(USABLE_SHARE * cluster.host_memory_bytes)
