"""When nothing fits: what would, each change tried by planning it, the cheapest first.

LoRA ─ shorter rows ─ more host memory ─ more of the same devices ─ another device ─ a smaller model
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from foretune.artifacts import Cluster
from foretune.config import Config
from foretune.errors import NoPlanFits, UserError
from foretune.planning.explain import shortfall
from foretune.planning.kernels import NO_SUMS_APART
from foretune.planning.machines import catalogue
from foretune.planning.predict import host, memory
from foretune.planning.search import LOSS_CHUNKS, Candidate, best_of_families, search_space
from foretune.planning.search.pins import NOT_COMPILED, NOT_PACKED
from foretune.planning.strategy import GIB, Workload, gib

#: Shorter rows than this are not proposed.
SHORTEST_ROWS = 128
#: Devices that a machine has at most, and how many times as many machines are tried.
MOST_DEVICES = 8
MACHINES = (2, 4, 8, 16, 32, 64, 128)


def nothing_fits(
    config: Config, work: Workload, cluster: Cluster, candidates: list[Candidate]
) -> UserError | NoPlanFits:
    """`UserError` for a pin that forbids what would fit, else `NoPlanFits` with the changes that would do."""
    if not candidates:
        return _pins_exclude(config)
    nearest = min(candidates, key=lambda one: _bytes_over(one, cluster))
    pins = {name: value for name, value in config.plan.model_dump().items() if value not in ("auto", None)}
    pins.pop("nvme_path", None)
    for freed in [*([name] for name in pins), list(pins)]:
        plan = config.plan.model_copy(update=dict.fromkeys(freed, "auto"))
        free = config.model_copy(update={"plan": plan})
        if freed and any(one.fits for one in search_space(free, work, cluster)):
            what = " and ".join(f"plan.{name}" for name in freed)
            field = f"plan.{freed[0]}"
            return UserError(
                field, pins[freed[0]], shortfall(nearest, cluster), f"remove {what}: without it a plan fits"
            )
    lines = [f"{one.strategy.name}: {shortfall(one, cluster)}" for one in best_of_families(candidates)]
    changes = list(changes_that_fit(config, work, cluster))
    return NoPlanFits(lines, "; or ".join(changes) if changes else "a smaller model")


def _pins_exclude(config: Config) -> UserError:
    """One key leaves no layout that another would allow: only these narrow the search to some stages."""
    if config.plan.sum_in_matmul is True:
        return UserError("plan.sum_in_matmul", True, NO_SUMS_APART, "remove the key")
    for name in ("fused_mlp", "fused_qkv"):
        if getattr(config.plan, name) is True:
            return UserError(f"plan.{name}", True, f"{NOT_COMPILED}, and {NO_SUMS_APART}", "remove the key")
    if config.plan.recompute_pointwise is True:
        return UserError("plan.recompute_pointwise", True, NOT_COMPILED, "remove the key")
    if config.plan.keep_attention is True:
        return UserError("plan.keep_attention", True, f"{NOT_COMPILED}, and {NOT_PACKED}", "remove the key")
    assert config.plan.fp8 is True
    return UserError(
        "plan.fp8", True, "the other keys leave only ZeRO-3, which has no whole weights to cast", "remove the key"
    )


def changes_that_fit(config: Config, work: Workload, cluster: Cluster) -> Iterator[str]:
    """The usual remedies that make something fit, the cheapest first."""
    if config.method == "full":
        trainable = work.shape.lora_parameters(config.lora.r, config.lora.target_modules)
        adapted = replace(work, trainable=trainable, frozen=work.shape.parameters, lora_rank=config.lora.r)
        if something_fits(config, adapted, cluster):
            yield f"--set method=lora trains {trainable:,} parameters instead of {work.trainable:,}"
    yield from _shorter_rows(config, work, cluster)
    yield from _numerics(config, work, cluster)
    yield from _more_memory(config, work, cluster)
    if cluster.accelerator.kind == "cuda":
        yield from _more_devices(config, work, cluster)
        yield from _another_device(config, work, cluster)


def something_fits(config: Config, work: Workload, cluster: Cluster) -> bool:
    """Whether any strategy fits: if one does, it does with the least rows, the smallest chunk, and either no layer
    recomputed or all of them, and whatever is pinned beside."""
    plan, layers = config.plan, work.shape.num_layers
    free = plan.micro_batch_size_per_gpu == "auto" and plan.gradient_accumulation_steps == "auto"
    least = {"micro_batch_size_per_gpu": 1} if free else {}
    chunk = {"loss_chunk_tokens": LOSS_CHUNKS[-1]} if plan.loss_chunk_tokens == "auto" else {}
    depths = (0, layers) if plan.checkpointed_layers == "auto" else (plan.checkpointed_layers,)
    for depth in depths:
        pins = plan.model_copy(update={**least, **chunk, "checkpointed_layers": depth})
        narrowed = config.model_copy(update={"plan": pins})
        if any(one.fits for one in search_space(narrowed, work, cluster)):
            return True
    return False


def _shorter_rows(config: Config, work: Workload, cluster: Cluster) -> Iterator[str]:
    length = work.max_length // 2
    while length >= SHORTEST_ROWS:
        shorter = replace(
            work,
            max_length=length,
            row_length=min(work.row_length, length),
            document_length=min(work.document_length, length),
        )
        if something_fits(config, shorter, cluster):
            yield f"--set train.max_length={length}"
            return
        length //= 2


def _numerics(config: Config, work: Workload, cluster: Cluster) -> Iterator[str]:
    allowed = config.model_copy(update={"allow_numerics": True})
    if not config.allow_numerics and work.precision == "bf16" and something_fits(allowed, work, cluster):
        yield "--allow-numerics keeps optimizer states in 8 bits or bf16, which changes the result"


def _more_memory(config: Config, work: Workload, cluster: Cluster) -> Iterator[str]:
    """The least host memory that would do, rounded up to 8 GiB."""
    on_cpu = cluster.accelerator.kind == "cpu"

    def with_memory(size: int) -> Cluster:
        accelerator = cluster.accelerator
        if on_cpu:
            accelerator = accelerator.model_copy(update={"memory_bytes": size // cluster.devices_per_node})
        return cluster.model_copy(update={"host_memory_bytes": size, "accelerator": accelerator})

    low, high = cluster.host_memory_bytes, 64 * cluster.host_memory_bytes
    if not something_fits(config, work, with_memory(high)):
        return
    while high - low > 8 * GIB:
        middle = (low + high) // 2
        low, high = (low, middle) if something_fits(config, work, with_memory(middle)) else (middle, high)
    size = -(-high // (8 * GIB)) * 8 * GIB
    yield f"{gib(size)} of host memory a machine" + ("" if on_cpu else ", to offload into")


def _more_devices(config: Config, work: Workload, cluster: Cluster) -> Iterator[str]:
    have, name = cluster.devices_per_node, cluster.accelerator.name
    memory_each = cluster.host_memory_bytes / have
    for devices in range(have + 1, MOST_DEVICES + 1):
        wider = cluster.model_copy(
            update={"devices_per_node": devices, "host_memory_bytes": int(memory_each * devices)}
        )
        if something_fits(config, work, wider):
            more = devices - have
            ram = f"ram={wider.host_memory_bytes / GIB:.0f}GB"
            yield f"{more} more GPU{'s' if more > 1 else ''} ({devices}x{name},{ram})"
            return
    for factor in MACHINES:
        nodes = cluster.nodes * factor
        if something_fits(config, work, cluster.model_copy(update={"nodes": nodes})):
            yield f"{factor} times as many machines ({nodes}x{have}x{name})"
            return


def _another_device(config: Config, work: Workload, cluster: Cluster) -> Iterator[str]:
    """The card with the least memory in the catalogue that does with as many."""
    have = cluster.accelerator.memory_bytes
    larger = [card for card in catalogue.CARDS if card.memory_bytes > have]
    for card in sorted(larger, key=lambda card: (card.memory_bytes, card.peak_tflops)):
        if work.precision == "bf16" and not card.bf16:
            continue
        accelerator = cluster.accelerator.model_copy(update={"name": card.name, "memory_bytes": card.memory_bytes})
        if something_fits(config, work, cluster.model_copy(update={"accelerator": accelerator})):
            nodes = f"{cluster.nodes}x" if cluster.nodes > 1 else ""
            yield f"another GPU ({nodes}{cluster.devices_per_node}x{card.name})"
            return


def _bytes_over(one: Candidate, cluster: Cluster) -> int:
    device = max(0, one.device.peak - memory.budget(cluster))
    return device + max(0, one.host_bytes - host.host_budget(cluster))
