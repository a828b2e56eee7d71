"""The search: which layouts there are, which fit, which is fastest.

    stage × offload × optimizer's format × micro-batch × chunk of the loss × checkpointed layers
        ──memory──▶ those that fit ──time──▶ the fastest

For each layout, micro-batch and chunk the fewest checkpointed layers that fit are found by bisection: each costs time
and frees memory, so nothing between is worth looking at. A streamed optimizer costs time for every byte that leaves the
device, a kept layer frees time for every byte that stays: both are linear, so one of them goes as far as it can, the
other follows. Of candidates within 2 % of the fastest, the one with the
least machinery and memory wins. Pins narrow the search; what cannot be is refused with the reason. Buckets and
sub-groups are derived from the model (`buckets_for`) unless they are pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, floor

from foretune.artifacts import Cluster
from foretune.config import Config
from foretune.errors import UserError
from foretune.planning.predict import host, memory, timing
from foretune.planning.predict.memory import DeviceMemory
from foretune.planning.predict.timing import StepTime
from foretune.planning.strategy import Stage, Strategy, Workload

#: Tokens of one micro-batch on a CPU beyond which nothing gets faster and only memory is spent.
CPU_MICRO_BATCH_TOKENS = 4096
#: Candidates this near to the fastest count as equally fast.
EQUALLY_FAST = 1.02
#: Shares of the optimizer that may be offloaded at stage 3 by DeepSpeed.
OFFLOAD_RATIOS = tuple(round(0.1 * tenth, 1) for tenth in range(1, 11))
#: Steps of the share that is streamed: any will do, a hundredth is close enough to what just fits.
STREAMED_STEPS = 100
#: Tokens whose logits may exist at the same time: more is faster up to about 4096, less needs less memory.
LOSS_CHUNKS = (4096, 2048, 1024, 512)


@dataclass(frozen=True)
class Candidate:
    """A strategy with its figures."""

    strategy: Strategy
    device: DeviceMemory
    host_bytes: int
    time: StepTime
    fits_device: bool
    fits_host: bool

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host

    @property
    def seconds(self) -> float:
        """Of one optimizer step."""
        return self.time.total


def refuse_impossible_pins(config: Config, work: Workload, cluster: Cluster) -> None:
    """What no amount of memory would make right."""
    plan, layers, on_cpu = config.plan, work.shape.num_layers, cluster.accelerator.kind == "cpu"
    share, field = _pinned_share(config), "plan.offload_optimizer"
    if plan.checkpointed_layers != "auto" and plan.checkpointed_layers > layers:
        problem = f"the model has {layers} layers"
        raise UserError("plan.checkpointed_layers", plan.checkpointed_layers, problem, f"use at most {layers}")
    if plan.offload_param is True and plan.zero_stage not in ("auto", 3):
        problem = f"ZeRO-{plan.zero_stage} keeps whole parameters on the device"
        raise UserError("plan.offload_param", True, problem, "set plan.zero_stage to 3")
    if share is not None and 0 < share < 1 and on_cpu:
        raise UserError(field, share, "on a CPU there is no device to share the optimizer with", "remove the key")
    if share and plan.zero_stage == 0:
        raise UserError(field, plan.offload_optimizer, "ZeRO-0 cannot offload", "set plan.zero_stage to 1, 2 or 3")
    obstacle = streaming_obstacle(config, work, cluster)
    if plan.offload_optimizer_step == "device" and obstacle:
        problem = f"states cannot pass through the device: {obstacle}"
        raise UserError("plan.offload_optimizer_step", "device", problem, "use auto or host")
    if share is not None and 0 < share < 1 and obstacle:
        if plan.zero_stage not in ("auto", 3):
            problem = f"only ZeRO-3 offloads a part of the optimizer, or ZeRO-1 where it can be streamed ({obstacle})"
            raise UserError(field, share, problem, "set plan.zero_stage to 3")
        if config.train.optimizer != "adamw":
            problem = "DeepSpeed offloads a part of the optimizer for AdamW only"
            raise UserError(field, share, problem, "use true or false")
    if plan.zero_stage == 0 and work.accumulation_dtype != work.precision:
        raise UserError(
            "plan.gradient_accumulation_dtype",
            work.accumulation_dtype,
            f"ZeRO-0 can only add gradients up in {work.precision}",
            f"use {work.precision}, or plan.zero_stage 1",
        )
    if plan.nvme_path is not None and on_cpu:
        raise UserError("plan.nvme_path", plan.nvme_path, "DeepSpeed swaps a GPU's states only", "remove the key")
    if plan.optimizer_dtype == "bf16":
        _refuse_bf16_states(config, work, share)


def _refuse_bf16_states(config: Config, work: Workload, share: float | None) -> None:
    """What bf16 masters need (DeepSpeed 0.19.8: runtime/config.py, base_optimizer.py): bf16, a stage, no CPUAdam."""
    plan, field = config.plan, "plan.optimizer_dtype"
    if not config.allow_numerics:
        raise UserError(field, "bf16", "changes the numerics of training", "add --allow-numerics, or use fp32")
    if work.precision != "bf16":
        raise UserError(field, "bf16", f"the model trains in {work.precision}", "use fp32, or train.precision bf16")
    if plan.zero_stage == 0:
        raise UserError(field, "bf16", "ZeRO-0 keeps fp32 states", "set plan.zero_stage to 1, 2 or 3")
    if share or plan.offload_param is True:
        raise UserError(field, "bf16", "offloaded states are fp32 here", "set plan.offload_optimizer to false")
    if plan.gradient_accumulation_dtype == "fp32":
        raise UserError(field, "bf16", "a bf16 master is stepped with bf16 gradients", "do not pin the sums to fp32")


def streaming_obstacle(config: Config, work: Workload, cluster: Cluster) -> str | None:
    """Why an offloaded optimizer cannot be streamed (`foretune.engine.streaming`); None if it can."""
    plan = config.plan
    if cluster.accelerator.kind != "cuda":
        return "there is no device to pass through"
    if plan.offload_optimizer_step == "host":
        return "plan.offload_optimizer_step is host"
    if work.lora_rank:
        return "the states of adapters are small"
    if work.precision != "bf16" or work.accumulation_dtype != "fp32":
        return f"it takes bf16 weights and fp32 sums, not {work.precision} and {work.accumulation_dtype}"
    if config.train.optimizer == "sgd":
        return "it is written for Adam"
    if plan.zero_stage not in ("auto", 1):
        return f"it is written for ZeRO-1, and plan.zero_stage is {plan.zero_stage}"
    if plan.optimizer_dtype == "bf16":
        return "its states are fp32"
    if plan.offload_param is True:
        return "parameters are offloaded at ZeRO-3 only"
    if _pinned_share(config) == 0:
        return "plan.offload_optimizer is false"
    return None


def _pinned_share(config: Config) -> float | None:
    asked = config.plan.offload_optimizer
    return None if asked == "auto" else float(asked)


def work_for(work: Workload, strategy: Strategy) -> Workload:
    """The work as a strategy does it: a bf16 master is stepped with gradients that are summed in bf16."""
    return replace(work, accumulation_dtype=work.precision) if strategy.bf16_states else work


def search_space(config: Config, work: Workload, cluster: Cluster) -> Iterator[Strategy]:
    """Every combination worth looking at, with pins kept."""
    pinned_layers, pinned_chunk = config.plan.checkpointed_layers, config.plan.loss_chunk_tokens
    batches = list(_batches(config, work, cluster))
    for layout in _layouts(config, work, cluster):
        for micro_batch, steps in batches:
            tokens = micro_batch * work.max_length
            chunks = sorted({min(chunk, tokens) for chunk in LOSS_CHUNKS}, reverse=True)
            fewest: int | None = None
            for chunk in chunks if pinned_chunk == "auto" else (pinned_chunk,):
                batch = replace(layout, micro_batch_size=micro_batch, accumulation_steps=steps, loss_chunk_tokens=chunk)
                layers = fewest_layers(work_for(work, batch), batch, cluster, at_most=fewest)
                layers = layers if pinned_layers == "auto" else pinned_layers
                if fewest is None or layers < fewest or chunk == chunks[-1]:
                    yield from _with_shares(config, work, replace(batch, checkpointed_layers=layers), cluster)
                if layers == 0:
                    break  # smaller chunks are slower, and nothing is left to be saved
                fewest = layers


def _with_shares(config: Config, work: Workload, strategy: Strategy, cluster: Cluster) -> Iterator[Strategy]:
    """A strategy as it is; streamed, with the least share that fits it, and that which fits all layers recomputed."""
    if not strategy.streamed or _pinned_share(config) is not None:
        yield strategy
        return
    depths = {strategy.checkpointed_layers}
    if config.plan.checkpointed_layers == "auto":
        depths.add(work.shape.num_layers)
    for layers in depths:
        one = replace(strategy, checkpointed_layers=layers)
        if share := _least_share(work, one, cluster):
            yield replace(one, offload_optimizer=share)


def _least_share(work: Workload, strategy: Strategy, cluster: Cluster) -> float:
    """The least share of a streamed optimizer with which the device is large enough; 1 if none is, 0 if all stays."""
    whole = strategy.state_bytes(work) * memory.shard_of(work, strategy, cluster)
    by_phase = memory.phases(work, strategy, cluster)
    by_phase.pop(memory.BUILDING)  # no share changes it
    left = memory.budget(cluster) - max(sum(parts.values()) for parts in by_phase.values())
    stays = floor(STREAMED_STEPS * max(0, left) / whole) / STREAMED_STEPS
    return round(1.0 - min(1.0, stays), 2)


def _layouts(config: Config, work: Workload, cluster: Cluster) -> Iterator[Strategy]:
    """Stage, what is offloaded and where to, the format of the optimizer's states; one row a micro-batch."""
    plan, pinned, base = config.plan, _pinned_share(config), Strategy(0, 1, 1).sized_for(work)
    if plan.reduce_bucket_size != "auto":
        base = replace(base, reduce_bucket_size=plan.reduce_bucket_size)
    if plan.sub_group_size != "auto":
        base = replace(base, sub_group_size=plan.sub_group_size)
    stages: tuple[Stage, ...] = (0, 1, 2, 3) if plan.zero_stage == "auto" else (plan.zero_stage,)
    for stage in stages:
        if stage == 0 and work.accumulation_dtype != work.precision:
            continue  # DeepSpeed has no ZeRO-0 with 16-bit weights and fp32 accumulation
        if plan.optimizer_dtype != "fp32" and _may_have_bf16_states(config, work, stage):
            yield replace(base, zero_stage=stage, bf16_states=True)
        if plan.optimizer_dtype == "bf16":
            continue
        for share in _streamed(config, work, cluster, stage):
            yield replace(base, zero_stage=stage, offload_optimizer=share, streamed=True)
        for share in _shares(config, cluster, stage, pinned):
            if (share and stage == 0) or (0 < share < 1 and stage != 3):
                continue
            if plan.offload_optimizer_step == "device" and share:
                continue
            for offload_param in _param_offloads(config, cluster, stage, share):
                one = replace(base, zero_stage=stage, offload_optimizer=share, offload_param=offload_param)
                yield one
                if plan.nvme_path is not None and stage == 3 and share == 1:
                    yield replace(one, nvme=True)


def _streamed(config: Config, work: Workload, cluster: Cluster, stage: Stage) -> tuple[float, ...]:
    """Shares of a streamed optimizer to begin with: the pinned one, or all, of which `_with_shares` takes back."""
    if stage != 1 or streaming_obstacle(config, work, cluster):
        return ()
    pinned = _pinned_share(config)
    return (1.0,) if pinned is None else (pinned,)


def _may_have_bf16_states(config: Config, work: Workload, stage: Stage) -> bool:
    plan = config.plan
    offloads = bool(_pinned_share(config)) or plan.offload_param is True
    sums_may_change = plan.gradient_accumulation_dtype != "fp32"
    return config.allow_numerics and work.precision == "bf16" and stage > 0 and not offloads and sums_may_change


def _shares(config: Config, cluster: Cluster, stage: Stage, pinned: float | None) -> tuple[float, ...]:
    if pinned is not None:
        return (pinned,)
    if cluster.accelerator.kind == "cpu" or stage <= 1:
        return (0.0,)  # ZeRO-1 keeps whole gradients on the device: ZeRO-2 offloads the same with less
    if stage == 3 and config.train.optimizer == "adamw":
        return (0.0, *OFFLOAD_RATIOS)
    return (0.0, 1.0)


def _param_offloads(config: Config, cluster: Cluster, stage: Stage, share: float) -> tuple[bool, ...]:
    asked = config.plan.offload_param
    if asked != "auto":
        return (asked,) if stage == 3 or not asked else ()
    return (False, True) if stage == 3 and share == 1 and cluster.accelerator.kind == "cuda" else (False,)


def _batches(config: Config, work: Workload, cluster: Cluster) -> Iterator[tuple[int, int]]:
    """(micro-batch, accumulation): rows of a rank's share in equal pieces; empty rows fill up what does not divide."""
    plan, ranks = config.plan, cluster.world_size
    share = ceil(work.rows / ranks)
    most = share
    if cluster.accelerator.kind == "cpu":
        most = min(share, max(1, CPU_MICRO_BATCH_TOKENS // work.max_length))
    if plan.micro_batch_size_per_gpu != "auto":
        sizes = [plan.micro_batch_size_per_gpu]
    elif plan.gradient_accumulation_steps != "auto":
        sizes = [ceil(share / plan.gradient_accumulation_steps)]
    else:
        sizes = sorted(
            {ceil(share / pieces) for pieces in range(1, share + 1) if ceil(share / pieces) <= most}, reverse=True
        )
    for size in sizes:
        needed = ceil(share / size)
        steps = needed if plan.gradient_accumulation_steps == "auto" else plan.gradient_accumulation_steps
        if steps < needed:
            raise UserError(
                "plan.gradient_accumulation_steps",
                steps,
                f"{ranks} ranks × {size} rows × {steps} are fewer than the {work.rows} rows of a batch",
                f"use {needed}, a larger plan.micro_batch_size_per_gpu or a smaller train.global_batch_size",
            )
        yield size, steps


def fewest_layers(work: Workload, strategy: Strategy, cluster: Cluster, *, at_most: int | None = None) -> int:
    """The fewest checkpointed layers that fit the device; all of them if none fit."""
    limit, low = memory.budget(cluster), 0
    high = work.shape.num_layers if at_most is None else at_most

    def fits(layers: int) -> bool:
        return memory.device_memory(work, replace(strategy, checkpointed_layers=layers), cluster).peak <= limit

    if fits(0):
        return 0
    if not fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def evaluate(work: Workload, strategy: Strategy, cluster: Cluster) -> Candidate:
    """A strategy's figures."""
    work = work_for(work, strategy)
    device = memory.device_memory(work, strategy, cluster)
    host_bytes = host.host_memory_per_node(work, strategy, cluster)
    time = timing.step_time(work, strategy, cluster)
    fits_device, fits_host = device.peak <= memory.budget(cluster), host_bytes <= host.host_budget(cluster)
    return Candidate(strategy, device, host_bytes, time, fits_device, fits_host)


def fastest(candidates: list[Candidate]) -> Candidate | None:
    """The fastest that fits; among the equally fast the one with the least machinery, then the least memory.

    Nothing that changes numerics wins without being faster. None if nothing fits.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return None
    least = min(candidate.seconds for candidate in fitting)
    return min(
        (candidate for candidate in fitting if candidate.seconds <= EQUALLY_FAST * least),
        key=lambda one: (
            one.strategy.nvme,
            one.strategy.bf16_states,
            one.strategy.offload_param,
            one.strategy.offload_optimizer > 0 and not one.strategy.streamed,
            one.strategy.offload_optimizer,
            one.strategy.zero_stage,
            one.strategy.checkpointed_layers,
            -one.strategy.loss_chunk_tokens,
            one.device.peak,
        ),
    )


def family_of(one: Candidate) -> tuple[int, bool, bool, bool, bool, bool]:
    """Stage, what is offloaded and where to, the optimizer's format: what people call a configuration."""
    s = one.strategy
    return s.zero_stage, s.offload_optimizer > 0, s.streamed, s.offload_param, s.nvme, s.bf16_states


def best_of_families(candidates: list[Candidate]) -> list[Candidate]:
    """The best of each family: the fastest that fits, else the one nearest to fitting."""
    families: dict[tuple[bool | int, ...], list[Candidate]] = {}
    for one in candidates:
        families.setdefault(family_of(one), []).append(one)
    return [
        min(family, key=lambda one: (not one.fits, one.seconds if one.fits else one.device.peak + one.host_bytes))
        for _, family in sorted(families.items())
    ]
