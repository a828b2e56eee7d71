"""Time of the optimizer's step, and of what passes through the host's link for it, in closed form; seconds.

Workload × Strategy × Cluster ──▶ what offloading adds, the step on the device, what the first step takes longer

Constants carry their measurement; "fitted" is explained in `foretune.planning.predict.timing`.
"""

from __future__ import annotations

from foretune.artifacts import Cluster
from foretune.planning.strategy import Strategy, Workload

#: Of the data sheet's memory bandwidth, what kernels of a layer's size reach (fitted).
BANDWIDTH_SHARE = 0.62
#: Bytes of memory traffic per trained parameter in a fused Adam step with its norm, casts and ZeRO's copies (fitted).
OPTIMIZER_BYTES = 38.0
#: The same on a CPU, where the norm is computed in fp64.
CPU_OPTIMIZER_BYTES = 80.0
#: The same where moments have 8 bits. Compiled: 0.19 s for 7.6e9 on an H100; eager: counted, not measured.
EIGHT_BIT_OPTIMIZER_BYTES = {"compiled": 50.0, "eager": 180.0}
#: Of an optimizer step: DeepSpeed's Python, waiting for the norm (fitted).
STEP_SECONDS = {"cuda": 0.0175, "cpu": 1e-3}
#: CPU Adam: trained parameters per second and core. torch's at stages 1 and 2 took 0.6 s for 1.5e9 on 16 cores,
#: DeepSpeed's in sub-groups at stage 3 4-5 s for 5.3e9.
CPU_ADAM_PER_CORE = {"whole": 160e6, "sub-groups": 75e6}
#: Of the host's link, what streamed states reach each way, both at once: 77.7 GB up and down in 1.81 s, PCIe 5 (7B).
STREAMED_LINK_SHARE = 0.95
#: Bytes per second that a machine's memory gives to all ranks' links together; assumed, one rank does not reach it.
HOST_MEMORY_BANDWIDTH = 200e9
#: Bytes per second at which a rank page-locks what is streamed, once, in its first step (measured: 77.7 GB in 25 s).
PAGE_LOCKING = 3.1e9


def bandwidth(cluster: Cluster) -> float:
    """Bytes per second of a device's memory as kernels of a layer's size reach it."""
    return BANDWIDTH_SHARE * cluster.accelerator.memory_bandwidth


def update_seconds(work: Workload, strategy: Strategy, cluster: Cluster) -> tuple[float, float]:
    """(offload, optimizer): seconds on the host's link and in the host's Adam, and of the step on the device."""
    accelerator = cluster.accelerator
    stage = strategy.zero_stage
    shard = work.trainable / (cluster.world_size if stage else 1)
    if accelerator.kind == "cpu":
        each = EIGHT_BIT_OPTIMIZER_BYTES["eager"] if strategy.optimizer_dtype == "8bit" else CPU_OPTIMIZER_BYTES
        return 0.0, shard * each / accelerator.memory_bandwidth + STEP_SECONDS["cpu"]
    moved = strategy.offload_optimizer * shard
    rate = bandwidth(cluster)
    if strategy.streamed:
        return _streaming(work, strategy, cluster, moved), shard * OPTIMIZER_BYTES / rate + STEP_SECONDS["cuda"]
    each = OPTIMIZER_BYTES
    if strategy.optimizer_dtype == "8bit":
        each = EIGHT_BIT_OPTIMIZER_BYTES["compiled" if work.compiled else "eager"]
    on_device = (shard - moved) * each / rate + STEP_SECONDS["cuda"]
    cores = max(1.0, cluster.cores_per_node / cluster.devices_per_node)
    offload = moved / (CPU_ADAM_PER_CORE["sub-groups" if stage == 3 else "whole"] * cores)
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


def _streaming(work: Workload, strategy: Strategy, cluster: Cluster, moved: float) -> float:
    """Seconds of streaming beyond those of the device's Adam, which goes on meanwhile; ranks share a host's memory."""
    shared = HOST_MEMORY_BANDWIDTH / (2 * cluster.devices_per_node)
    travel = strategy.state_bytes(work) * moved / min(STREAMED_LINK_SHARE * cluster.host_link_bandwidth, shared)
    return max(0.0, travel - work.trainable / cluster.world_size * OPTIMIZER_BYTES / bandwidth(cluster))


def starting_seconds(work: Workload, strategy: Strategy, cluster: Cluster) -> float:
    """What the first step takes longer, beside compiling: the pages of streamed states are locked."""
    if not strategy.streamed:
        return 0.0
    shard = work.trainable / cluster.world_size
    return strategy.state_bytes(work) * strategy.offload_optimizer * shard / PAGE_LOCKING


def _nvme_seconds(work: Workload, strategy: Strategy, cluster: Cluster, moved: float) -> float:
    """States are read and written once a step, parameters read three times a micro-batch; a node's ranks share it."""
    optimizer = 2 * strategy.state_bytes(work) * moved
    share = work.parameters / cluster.world_size if strategy.offload_param else 0.0
    parameters = 3 * strategy.accumulation_steps * work.parameter_bytes * share
    return (optimizer + parameters) * cluster.devices_per_node / cluster.disk_bandwidth
