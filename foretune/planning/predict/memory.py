"""Memory of one rank and of one node in closed form. Bytes; ψ parameters, ψt the trained ones, N the number of ranks.

Workload × Strategy × Cluster ──▶ parts by phase ──▶ the peak, and the phase it is in

States (Rajbhandari et al. 2020, ZeRO, §3 and §5; transients measured on DeepSpeed 0.19.8 under a storage tracker),
with b bytes of a parameter in forward (2 or 4), a of an accumulated gradient, s of the optimizer's states (8 for Adam):

    stage   parameters   fp32 master + states   gradients            added while stepping
    0       bψ           (4 if b=2) ψt + sψt    bψt                  8ψt in 16 bits
    1       bψ           (4+s)ψt/N              aψt, + bψt if a≠b    4ψt/N in fp32, 6ψt/N with a=2, 0 with a=4, b=2
    2       bψ           (4+s)ψt/N              aψt/N                the same, but 0.8ψt/N with a=4, b=2
    3       bψ/N         (4+s)ψt/N              aψt/N                4·min(ψt/N, sub-group), 6 with a=2

On CPUs stage 2 keeps whole gradients, as stage 1 does, and reduces them once a step (`reduced_at_step`).
Offloading moves master, states and gradients to the host; streamed, it moves master and states alone, and what travels
has slots on the device. In 8 bits a state is a byte and there is no master; a step adds what is fp32 of one piece.
Activations: `activation_bytes_per_token_layer`. A checkpointed layer keeps its input, and attention's output if it is
told to, and recomputes itself in backward, one layer at a time (Chen et al. 2016).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from foretune.artifacts import Cluster
from foretune.planning.predict import activations
from foretune.planning.strategy import GIB, Strategy, Workload, buckets_for, sums_apart, sums_inside

#: CUDA context, cuBLAS workspaces and kernels of one process; several ranks have NCCL's channels on top.
CUDA_CONTEXT_BYTES = int(0.75 * GIB)
NCCL_BYTES = int(0.5 * GIB)
#: A Python process with torch, transformers and deepspeed imported, no weights.
PROCESS_BYTES = int(0.6 * GIB)
#: Gradients that DeepSpeed's engine reduces in one flat copy where ZeRO's own buckets are not used.
REDUCED_AT_ONCE = 500_000_000
#: Of streamed states (`foretune.engine.states.streaming`): elements that travel at a time, and places on the device.
STREAMED_PIECE, STREAMED_SLOTS = 1 << 25, 3
#: Of 8-bit states: elements that are stepped at a time, and their bytes in fp32 (`foretune.engine.states.eight_bits`).
EIGHT_BIT_PIECE, EIGHT_BIT_STEP_BYTES = 1 << 24, 48
#: What malloc keeps of freed blocks on a CPU beside gradients, which are counted whole: SmolLM2-135M, two ranks, took
#: 3.26 GiB at ZeRO-2 (rows of 384) and 3.39 at ZeRO-1 (rows of 512), 3 % and 0.5 % more than all parts.
MALLOC_SHARE = 0.02
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


def device_memory(work: Workload, strategy: Strategy, cluster: Cluster) -> DeviceMemory:
    """Peak memory of one rank's device. On a CPU the device is the rank's share of the host, so nothing leaves it."""
    by_phase = phases(work, strategy, cluster)
    worst = max(by_phase, key=lambda name: sum(by_phase[name].values()))
    return DeviceMemory(worst, {name: size for name, size in by_phase[worst].items() if size})


def phases(work: Workload, strategy: Strategy, cluster: Cluster) -> dict[str, dict[str, int]]:
    """Bytes by part, for each phase of a step that can be its peak."""
    stays, on_cpu = _share_on_device(strategy, cluster), cluster.accelerator.kind == "cpu"
    resident = states(work, strategy, cluster)
    if on_cpu:
        resident["process"] = PROCESS_BYTES
    else:
        resident["context"] = CUDA_CONTEXT_BYTES + (NCCL_BYTES if cluster.world_size > 1 else 0)

    tokens = strategy.micro_batch_size * work.max_length
    kept = activations.activation_bytes(work, strategy)
    tile = activations.tile_bytes(work, strategy)
    inside = tile + tokens * activations.working_bytes_per_token(work, strategy, recomputing=False)
    layer = tokens * activations.layer_bytes_per_token(work, strategy)
    shard = shard_of(work, strategy, cluster)
    whole = reduced_at_step(work, strategy, cluster)
    gradients, transient = _gradient_bytes(work, strategy, shard, stays, whole=whole)
    # Malloc does not give activations the memory of freed gradients, whose sizes are others.
    earlier = gradients if on_cpu else _gradients_in_forward(work, strategy, gradients, whole=whole)
    summed = sums_inside(work, strategy)
    head = activations.head_gradient_bytes(work, strategy, summed=summed)
    persistent, passing = buffer_bytes(work, strategy, cluster)
    gathered = gathered_bytes(work, strategy, cluster.world_size)
    varying = {
        "loss": {
            "gradients": earlier,
            "activations": kept,
            "loss": activations.loss_bytes(work, strategy, summed=summed),
            "buffers": persistent + gathered,
        },
        "backward": {
            "gradients": earlier,
            "activations": kept + inside,
            "loss": head,
            "buffers": persistent + passing + gathered,
        },
        "end of backward": {
            "gradients": gradients + transient,
            "activations": layer + inside,
            "buffers": persistent + passing + gathered + reduced_at_once(work, strategy, cluster),
        },
        "step": {
            "gradients": gradients,
            "step": step_bytes(work, strategy, cluster),
            "buffers": persistent,
        },
    }
    if strategy.checkpointed_layers:
        # The first layers recompute, when those behind them have given back what they kept. Counted as if all of them
        # recomputed: an input is little beside what a layer keeps, and so no layer more ever needs more memory. The
        # gradients that those behind have made by then are no more than that, or are counted at the end of backward.
        again = tile + tokens * activations.working_bytes_per_token(work, strategy, recomputing=True)
        saved = layer - tokens * activations.checkpoint_bytes_per_token(work, strategy)
        freed = (work.shape.num_layers - strategy.checkpointed_layers) * saved
        freed += freed_by_last_norm(work, strategy, cluster)
        varying["recomputation"] = {**varying["backward"], "activations": kept - freed + layer + again}
        varying["end of backward"]["activations"] = layer + again
    by_phase = {name: {**resident, **parts} for name, parts in varying.items()}
    if on_cpu:
        for parts in by_phase.values():
            parts["allocator"] = int(MALLOC_SHARE * (sum(parts.values()) - PROCESS_BYTES))
    return by_phase


def freed_by_last_norm(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """What the last norm has given back when layers recompute: 1 to 5 % of a peak with long rows, measured at 1.5B.

    Nothing on a CPU, where malloc may not give it to others; nor with adapters, where as much is there at that time, of
    a kind that was not told apart.
    """
    if cluster.accelerator.kind == "cpu" or work.lora_rank:
        return 0
    return strategy.micro_batch_size * work.max_length * activations.last_norm_bytes_per_token(work)


def shard_of(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """Trained parameters whose optimizer states a rank keeps: ψt/N, all of them at stage 0."""
    return ceil(work.trainable / cluster.world_size) if strategy.zero_stage else work.trainable


def states(work: Workload, strategy: Strategy, cluster: Cluster) -> dict[str, int]:
    """Parameters, and master weights with the optimizer's states, that stay on a device between steps."""
    on_device = _share_on_device(strategy, cluster) * _state_bytes(work, strategy) * shard_of(work, strategy, cluster)
    return {
        "parameters": work.parameter_bytes * held_parameters(work, strategy, cluster),
        "optimizer": int(on_device),
    }


def standing_bytes(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """What an engine holds between two steps, wherever it lies: states, standing gradients, persistent buffers."""
    if strategy.streamed:
        strategy = replace(strategy, offload_optimizer=0.0, streamed=False)
    shard = shard_of(work, strategy, cluster)
    here = replace(strategy, offload_param=False)
    held = work.parameter_bytes * held_parameters(work, here, cluster) + int(_state_bytes(work, strategy) * shard)
    whole = reduced_at_step(work, strategy, cluster)
    gradients, _ = _gradient_bytes(work, strategy, shard, 1.0, whole=whole)
    standing = _gradients_in_forward(work, replace(strategy, accumulation_steps=1), gradients, whole=whole)
    if strategy.offload_optimizer:
        standing = offloading_bytes(work, strategy, shard) - int(strategy.state_bytes(work) * shard)
    return held + standing + buffer_bytes(work, here, cluster)[0]


def offloading_bytes(work: Workload, strategy: Strategy, shard: int) -> int:
    """What an engine keeps for an optimizer that is offloaded whole, before anything is rounded up (dry runs).

    Master and states, and pinned: the fp32 gradients that the host's optimizer reads (4). At stages 1 and 2 a copy of
    the weights in their own format (b) and a buffer for the widest gradient, at stage 3 the accumulated gradients (a).
    """
    b, states = work.parameter_bytes, strategy.state_bytes(work)
    if strategy.zero_stage < 3:
        return int((states + 4 + b) * shard) + b * widest_of(work)
    return int((states + 4 + work.gradient_bytes) * shard)


def widest_of(work: Workload) -> int:
    """Parameters of the largest tensor that is trained: the embedding, or with adapters one of them."""
    shape = work.shape
    if not work.lora_rank:
        return shape.vocab_size * shape.hidden_size
    return work.lora_rank * max(max(linear.inputs, linear.outputs) for linear in shape.linears)


def _state_bytes(work: Workload, strategy: Strategy) -> float:
    if strategy.zero_stage == 0 and work.parameter_bytes == 4:
        return work.optimizer_state_bytes  # fp32 weights are their own master
    return strategy.state_bytes(work)


def _share_on_device(strategy: Strategy, cluster: Cluster) -> float:
    return 1.0 if cluster.accelerator.kind == "cpu" else 1.0 - strategy.offload_optimizer


def reduced_at_step(work: Workload, strategy: Strategy, cluster: Cluster) -> bool:
    """Whether ZeRO-2 sums whole gradients on every rank and reduces them once a step: on CPUs, with one format for all.

    `foretune.engine.reduction` does it: between CPU ranks a reduction of every micro-batch takes the computing cores.
    """
    on_cpu, one_format = cluster.accelerator.kind == "cpu", work.precision == work.accumulation_dtype
    return strategy.zero_stage == 2 and on_cpu and one_format


def buffer_bytes(work: Workload, strategy: Strategy, cluster: Cluster) -> tuple[int, int]:
    """(persistent, in backward): reduce bucket, and its copies on the way.

    Several ranks need copies: stages 1 and 2 one for the collective, stage 3 one flat and one scattered. Stage 3 keeps
    its bucket from the start, stages 1 and 2 make it in every backward, and keep a buffer for what goes to the host.
    What is reduced once a step needs none.
    Streamed states have their slots: master weights and two states in fp32, `STREAMED_SLOTS` pieces.
    """
    ranks = cluster.world_size
    if strategy.streamed:
        moved = ceil(strategy.offload_optimizer * work.trainable / ranks)
        return int(STREAMED_SLOTS * strategy.state_bytes(work) * min(STREAMED_PIECE, moved)), 0
    if strategy.zero_stage == 0 or sums_apart(work, strategy) or reduced_at_step(work, strategy, cluster):
        return 0, 0
    b, bucket, alone = work.parameter_bytes, strategy.reduce_bucket_size, ranks == 1
    if strategy.zero_stage < 3:
        staging = b * widest_of(work) if strategy.offload_optimizer else 0
        return staging, b * bucket * (1 if alone else 2)
    return b * bucket, 0 if alone else b * bucket * 2


def gathered_bytes(work: Workload, strategy: Strategy, ranks: int) -> int:
    """Parameters that ZeRO-3 has gathered at a time in forward and backward: those in use, and those fetched ahead."""
    if strategy.zero_stage < 3 or (ranks == 1 and not strategy.offload_param):
        return 0
    sizes = buckets_for(work.shape, work.trainable)
    return work.parameter_bytes * min(work.parameters, sizes.max_live + sizes.prefetch)


def held_parameters(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """Parameters that stay on the device between steps."""
    if strategy.zero_stage < 3:
        return work.parameters
    whole = persistent_parameters(work) if cluster.world_size > 1 else 0
    if strategy.offload_param and cluster.accelerator.kind != "cpu":
        return whole
    return ceil(work.parameters / cluster.world_size) + whole


def persistent_parameters(work: Workload) -> int:
    """What ZeRO-3 also keeps whole on every rank: tensors no larger than its threshold, so norms, biases, adapters."""
    shape, most = work.shape, persistence_threshold(work)
    sizes = [(linear.copies * linear.bias, linear.outputs) for linear in shape.linears]
    sizes += [(linear.copies, linear.inputs * linear.outputs) for linear in shape.linears]
    for linear in shape.linears if work.lora_rank else ():
        sizes += [(linear.copies, work.lora_rank * linear.inputs), (linear.copies, work.lora_rank * linear.outputs)]
    layer = sum(count * size for count, size in sizes if size <= most) + shape.layer_norm_parameters
    return shape.num_layers * layer + shape.final_norm_parameters


def persistence_threshold(work: Workload) -> int:
    """Elements of a tensor up to which ZeRO-3 keeps it whole: norms, biases, and the largest A or B of LoRA.

    Adapters are below 1 % of the model, and ZeRO-3 otherwise fetches and releases each of the fourteen of a layer by
    itself, three times a micro-batch.
    """
    adapters = [work.lora_rank * max(linear.inputs, linear.outputs) for linear in work.shape.linears]
    return max([buckets_for(work.shape, work.trainable).persistence, *adapters])


def reduced_at_once(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """The flat copy that DeepSpeed reduces outside of ZeRO's buckets: up to 5e8 gradients, in their format.

    Not where fp32 sums lie apart on a GPU: they are flat, and are reduced where they lie (`foretune.engine.sums`).
    """
    apart = sums_apart(work, strategy)
    in_place = apart and cluster.accelerator.kind == "cuda"
    if cluster.world_size == 1 or in_place or not (apart or strategy.zero_stage == 0):
        return 0
    return (work.gradient_bytes if apart else work.parameter_bytes) * min(work.trainable, REDUCED_AT_ONCE)


def _gradient_bytes(work: Workload, strategy: Strategy, shard: int, stays: float, *, whole: bool) -> tuple[int, int]:
    """Gradients kept on the device, and those that backward has beside them before they are reduced or added."""
    stage, trained = strategy.zero_stage, work.trainable
    b, a = work.parameter_bytes, work.gradient_bytes
    widest = work.shape.vocab_size * work.shape.hidden_size if not work.lora_rank else 0
    if stage == 0:
        return b * trained, b * widest
    if stage == 1:
        plain_ends = work.shape.plain_embedding and work.shape.plain_head
        if sums_inside(work, strategy) and plain_ends:  # the embedding's rows in fp32, as they come and are added
            return a * trained, 8 * strategy.micro_batch_size * work.max_length * work.shape.hidden_size
        if sums_apart(work, strategy):  # added to the standing fp32 buffer as they come
            return a * trained, b * widest
        # Summed in another format than they come in, gradients exist in both, and once more while they are added.
        kept = (a + b if a != b else a) * trained
        return kept, b * trained if a != b else b * widest
    if whole:
        return b * trained, b * widest
    kept = int(a * shard * stays)
    if stage == 3 and not strategy.offload_optimizer:
        return kept, b * widest
    return kept, 2 * b * widest  # a tied or large embedding's gradient before it leaves for its owner


def _gradients_in_forward(work: Workload, strategy: Strategy, gradients: int, *, whole: bool) -> int:
    """Gradients that are there before the last backward begins: those of earlier micro-batches, or a standing buffer.

    With one micro-batch a step and no standing buffer, gradients grow while activations are freed: only the larger of
    both counts. ZeRO-0 writes zeros into its gradients; ZeRO-3, ZeRO-1 with fp32 sums, and ZeRO-2 where it sums `whole`
    gradients keep a flat buffer for them.
    """
    standing = whole or strategy.zero_stage == 3 or sums_apart(work, strategy)
    if strategy.accumulation_steps > 1 or standing:
        return gradients
    return 0


def step_bytes(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """What the optimizer step adds: gradients on their way to fp32, or the norm's fp64 copy of the widest one (8Vh).

    Below stage 3 a GPU computes the norm without that copy (`foretune.engine.shortcuts`).
    """
    b, a, stage, ranks = work.parameter_bytes, work.gradient_bytes, strategy.zero_stage, cluster.world_size
    shard, stays = shard_of(work, strategy, cluster), _share_on_device(strategy, cluster)
    widest = work.shape.vocab_size * work.shape.hidden_size if not work.lora_rank else 0
    if stage == 0:
        return 0 if b == 4 else 8 * work.trainable
    if strategy.optimizer_dtype == "bf16":
        return 2 * shard
    if strategy.optimizer_dtype == "8bit":
        return EIGHT_BIT_STEP_BYTES * min(EIGHT_BIT_PIECE, shard)
    if stage == 3:
        tile = min(shard, strategy.sub_group_size)
        fp32_gradients = int(4 * shard * stays) if strategy.offload_optimizer else 4 * tile
        return max(fp32_gradients + (2 * tile if a == 2 else 0), 8 * widest // ranks)
    norm = 8 * min(widest, shard) if cluster.accelerator.kind == "cpu" else 0
    if sums_apart(work, strategy):
        return 0
    if a == 2:
        return int(6 * shard * stays)
    return max(norm, 0 if b == 2 else int(4 * shard * stays))


def initialisation_bytes(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """Peak while the engine is built: weights, master, and a copy of the shard on its way to fp32 (10ψ at N=1)."""
    shard = shard_of(work, strategy, cluster)
    return work.parameter_bytes * held_parameters(work, strategy, cluster) + 8 * shard


def budget(cluster: Cluster) -> int:
    """Bytes of a device that a plan may fill."""
    return int(USABLE_SHARE * cluster.accelerator.memory_bytes)
