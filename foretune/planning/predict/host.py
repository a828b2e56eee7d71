"""Memory of one node's host in closed form: its processes, what is offloaded, what is being saved, loading. Bytes."""

from __future__ import annotations

from math import ceil

from foretune.artifacts import Cluster
from foretune.planning.predict.memory import USABLE_SHARE, device_memory, initialisation_bytes, offloading_bytes
from foretune.planning.strategy import GIB, Strategy, Workload

#: A Python process with torch, transformers and deepspeed imported, CUDA's libraries and pinned staging buffers.
GPU_PROCESS_BYTES = int(3.5 * GIB)
#: Of parameters on NVMe, what passes through host memory: DeepSpeed's five pinned buffers of a layer's size each.
NVME_BUFFERS = 5


def host_memory_per_node(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """Host memory of one node at its most, snapshots of checkpoints not counted: see `snapshot_bytes`."""
    return sum(host_parts(work, strategy, cluster).values())


def host_parts(work: Workload, strategy: Strategy, cluster: Cluster) -> dict[str, int]:
    """The same by part: loading the weights, or running with what is offloaded and being saved, whichever is more.

    Offloading at stages 1 and 2: `offloading_bytes`, 18 a parameter of the rank's shard and a buffer (measured: device
    and host together 20.4, the device 2). At stage 3: 12 bytes of the offloaded share, its fp32 gradients pinned, and
    the accumulated gradients of the whole shard pinned; torch rounds pinned buffers up to a power of two.
    What lies on NVMe takes buffers only. Streamed: all master weights and states, since a save makes them whole there,
    and the 16-bit weights are what it copies (measured on 7B, 85 % streamed, before a save: 80.1 GB for 81.4).
    """
    per_node = cluster.devices_per_node
    if cluster.accelerator.kind == "cpu":
        peak = device_memory(work, strategy, cluster).peak
        return {"ranks": per_node * max(peak, initialisation_bytes(work, strategy, cluster))}
    shard = ceil(work.trainable / cluster.world_size)
    group = min(shard, strategy.sub_group_size) if strategy.zero_stage == 3 else shard
    parts = {"processes": GPU_PROCESS_BYTES}
    # Saving copies one flat tensor at a time from the device: at stage 3 a sub-group's, else the whole shard's.
    parts["copy while saving"] = work.parameter_bytes * work.trainable if strategy.streamed else 4 * group
    parts["optimizer"] = _offloaded_optimizer(work, strategy, shard, group)
    if strategy.offload_param:
        held = _power_of_two(work.parameter_bytes * ceil(work.parameters / cluster.world_size))
        layer = work.parameter_bytes * max(work.shape.layer_parameters, work.shape.vocab_size * work.shape.hidden_size)
        parts["parameters"] = NVME_BUFFERS * _power_of_two(layer) if strategy.nvme else held
    # Below stage 3 each rank reads the whole model before it goes to the device; at stage 3 weights stay mapped.
    loading = work.parameter_bytes * work.parameters if strategy.zero_stage < 3 else 0
    if GPU_PROCESS_BYTES + loading > sum(parts.values()):
        parts = {"processes": GPU_PROCESS_BYTES, "weights while loading": loading}
    return {name: per_node * size for name, size in parts.items() if size}


def _offloaded_optimizer(work: Workload, strategy: Strategy, shard: int, group: int) -> int:
    if not strategy.offload_optimizer:
        return 0
    if strategy.streamed:
        return int(strategy.state_bytes(work) * shard)
    if strategy.zero_stage < 3:
        return offloading_bytes(work, strategy, shard)
    pinned_gradients = shard / group * _power_of_two(4 * group)
    accumulated = _power_of_two(work.gradient_bytes * shard)
    if strategy.nvme:  # four buffers of a sub-group's states and gradients; accumulated gradients stay in memory
        return 4 * _power_of_two((8 + work.optimizer_state_bytes) * group) + accumulated
    states = (4 + work.optimizer_state_bytes) * shard
    return int(strategy.offload_optimizer * (states + pinned_gradients)) + accumulated


def snapshot_bytes(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """What a node's ranks hold in /dev/shm while a checkpoint is written behind the training: one copy of their share.

    Only where it fits; without, training waits for the disk.
    """
    return ceil(checkpoint_bytes(work, strategy) / cluster.nodes)


def snapshot_fits(work: Workload, strategy: Strategy, cluster: Cluster) -> bool:
    """Whether host memory has room for the snapshots beside everything else."""
    wanted = host_memory_per_node(work, strategy, cluster) + snapshot_bytes(work, strategy, cluster)
    return wanted <= host_budget(cluster)


def checkpoint_bytes(work: Workload, strategy: Strategy) -> int:
    """A checkpoint on disk: the trained weights, their master where there is one, and the optimizer's states."""
    b = work.parameter_bytes
    if strategy.zero_stage == 0 and b == 4:
        return (4 + work.optimizer_state_bytes) * work.trainable
    weights = 0 if strategy.zero_stage == 3 else b
    return int((weights + strategy.state_bytes(work)) * work.trainable)


def host_budget(cluster: Cluster) -> int:
    """Bytes of a node's host memory that a plan may fill."""
    return int(USABLE_SHARE * cluster.host_memory_bytes)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
