"""The planner: shape, cluster and configuration in, `Plan` out, with a reason for every choice.

    precision, batch, rates (defaults) ──▶ Workload
    stage × offload × micro-batch × checkpointed layers ──memory──▶ those that fit ──time──▶ the fastest ──▶ Plan

For each stage, offload and micro-batch the fewest checkpointed layers that fit are found by bisection: each costs time and
frees memory, so nothing between is worth looking at. Of candidates within 2 % of the fastest, the one with the least
machinery and memory wins. Pins narrow the search; what they forbid is refused with figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Literal

from foretune.artifacts import Alternative, Cluster, Decision, Plan, Prediction, PreparedDataset
from foretune.config import Config
from foretune.errors import NoPlanFits, UserError
from foretune.model.shape import ModelShape, read_shape
from foretune.planning import defaults, memory, timing
from foretune.planning.deepspeed_config import deepspeed_config
from foretune.planning.memory import DeviceMemory
from foretune.planning.shapes import known_shape
from foretune.planning.strategy import Strategy, Workload, gib

Stage = Literal[0, 1, 2, 3]

#: Tokens of one micro-batch on a CPU beyond which nothing gets faster and only memory is spent.
CPU_MICRO_BATCH_TOKENS = 4096
#: Candidates this near to the fastest count as equally fast.
EQUALLY_FAST = 1.02
#: Shares of the optimizer that may be offloaded at stage 3.
OFFLOAD_RATIOS = tuple(round(0.1 * tenth, 1) for tenth in range(1, 11))


@dataclass(frozen=True)
class Candidate:
    """A strategy with its figures."""

    strategy: Strategy
    device: DeviceMemory
    host_bytes: int
    seconds: float
    fits_device: bool
    fits_host: bool

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host


def make_plan(
    config: Config,
    *,
    model_folder: Path | str,
    cluster: Cluster,
    prepared: PreparedDataset | None,
    tokens: int | None = None,
) -> Plan:
    """Decide everything that was left open.

    Args:
        model_folder: a folder with a config.json, or a name from the built-in table of public models.
        tokens: of one epoch, where there is no prepared data.

    Raises:
        UserError: a pin or setting that cannot be, with the figures and its field.
        NoPlanFits: nothing fits, and nothing was pinned that forbids it.
    """
    shape = shape_for(model_folder)
    data = defaults.data_facts(config, shape, prepared, tokens)
    precision = defaults.choose_precision(config, cluster)
    accumulation = defaults.choose_accumulation_dtype(config, precision.value)
    batch = defaults.choose_global_batch(config, data)
    work = workload(config, shape, data, precision=precision.value, accumulation=accumulation.value, rows=batch.value)
    refuse_impossible_pins(config, work, cluster)

    candidates = [evaluate(work, strategy, cluster) for strategy in search_space(config, work, cluster)]
    best = choose(config, work, cluster, candidates)
    per_epoch, total = defaults.steps_of(config, data, batch.value)
    rate = defaults.choose_learning_rate(config, shape.parameters)
    every = defaults.choose_checkpoint_every(config, total, best.seconds)
    chosen = best.strategy
    decisions = [
        precision,
        accumulation,
        batch,
        rate,
        every,
        *explain_strategy(config, work, cluster, best, candidates),
    ]
    if shape.estimated:
        decisions.append(
            defaults.decide(
                "model", shape.family, "this family is not known: its parameters are estimated as a llama's"
            )
        )
    return Plan(
        model=str(model_folder),
        method=config.method,
        parameters=shape.parameters,
        trainable_parameters=work.trainable,
        cluster=cluster,
        world_size=cluster.world_size,
        precision=precision.value,
        zero_stage=chosen.zero_stage,
        offload_optimizer=chosen.offload_optimizer,
        offload_param=chosen.offload_param,
        micro_batch_size_per_gpu=chosen.micro_batch_size,
        gradient_accumulation_steps=chosen.accumulation_steps,
        gradient_accumulation_dtype=accumulation.value,
        checkpointed_layers=chosen.checkpointed_layers,
        loss_chunk_tokens=chosen.loss_chunk_tokens,
        global_batch_size=batch.value,
        max_length=data.max_length,
        packing=config.data.packing,
        learning_rate=rate.value,
        optimizer=config.train.optimizer,
        schedule=config.train.schedule,
        warmup_steps=defaults.warmup_steps_of(config, total),
        total_steps=total,
        steps_per_epoch=per_epoch,
        checkpoint_every=every.value,
        deepspeed_config=deepspeed_config(work, chosen, cluster, train=config.train),
        decisions=decisions,
        predicted=prediction(work, best, total_steps=total, keep=config.checkpoint.keep, data=data),
        rejected=rejected_families(work, cluster, candidates, best),
    )


def shape_for(model_folder: Path | str) -> ModelShape:
    """The shape of a folder, or of a public model by name where there is no such folder."""
    if isinstance(model_folder, str) and not Path(model_folder).exists():
        known = known_shape(model_folder)
        if known is not None:
            return known
    return read_shape(model_folder)


def workload(
    config: Config, shape: ModelShape, data: defaults.DataFacts, *, precision: str, accumulation: str, rows: int
) -> Workload:
    """The work of one step of this configuration."""
    if config.method == "lora":
        trainable, frozen = shape.lora_parameters(config.lora.r, config.lora.target_modules), shape.parameters
    else:
        trainable, frozen = shape.parameters, 0
    states = 8 if config.train.optimizer != "sgd" else (4 if config.train.momentum else 0)
    return Workload(
        shape=shape,
        trainable=trainable,
        frozen=frozen,
        lora_rank=config.lora.r if frozen else 0,
        precision=precision,
        accumulation_dtype=accumulation,  # type: ignore[arg-type]
        optimizer_state_bytes=states,
        max_length=data.max_length,
        global_batch_size=rows,
        document_length=data.document_length,
        packing=config.data.packing,
    )


def refuse_impossible_pins(config: Config, work: Workload, cluster: Cluster) -> None:
    """What no amount of memory would make right."""
    plan, layers = config.plan, work.shape.num_layers
    if plan.checkpointed_layers != "auto" and plan.checkpointed_layers > layers:
        raise UserError(
            "plan.checkpointed_layers",
            plan.checkpointed_layers,
            f"the model has {layers} layers",
            f"use at most {layers}",
        )
    if plan.offload_param is True and plan.zero_stage not in ("auto", 3):
        raise UserError(
            "plan.offload_param",
            True,
            f"ZeRO-{plan.zero_stage} keeps whole parameters on the device",
            "set plan.zero_stage to 3",
        )
    share = _pinned_share(config)
    if share and plan.zero_stage == 0:
        raise UserError(
            "plan.offload_optimizer",
            plan.offload_optimizer,
            "ZeRO-0 cannot offload",
            "set plan.zero_stage to 1, 2 or 3",
        )
    if share is not None and 0 < share < 1:
        if plan.zero_stage not in ("auto", 3):
            raise UserError(
                "plan.offload_optimizer",
                share,
                "only ZeRO-3 offloads a part of the optimizer",
                "set plan.zero_stage to 3",
            )
        if config.train.optimizer != "adamw":
            raise UserError(
                "plan.offload_optimizer",
                share,
                "DeepSpeed offloads a part of the optimizer for AdamW only",
                "use true or false",
            )
    if plan.zero_stage == 0 and work.accumulation_dtype != work.precision:
        raise UserError(
            "plan.gradient_accumulation_dtype",
            work.accumulation_dtype,
            f"ZeRO-0 can only add gradients up in {work.precision}",
            f"use {work.precision}, or plan.zero_stage 1",
        )


def _pinned_share(config: Config) -> float | None:
    asked = config.plan.offload_optimizer
    return None if asked == "auto" else float(asked)


def search_space(config: Config, work: Workload, cluster: Cluster) -> Iterator[Strategy]:
    """Every combination worth looking at, with pins kept; layers are still to be chosen by `evaluate`'s caller."""
    for stage, share, offload_param in _layouts(config, work, cluster):
        for micro_batch, steps in _batches(config, work, cluster):
            strategy = Strategy(
                stage, micro_batch, steps, 0, share, offload_param, min(2048, micro_batch * work.max_length)
            )
            asked = config.plan.checkpointed_layers
            layers = fewest_layers(work, strategy, cluster) if asked == "auto" else asked
            yield replace(strategy, checkpointed_layers=layers)


def _layouts(config: Config, work: Workload, cluster: Cluster) -> Iterator[tuple[Stage, float, bool]]:
    """Stage, share of the optimizer in host memory, parameters in host memory."""
    plan, pinned = config.plan, _pinned_share(config)
    stages: tuple[Stage, ...] = (0, 1, 2, 3) if plan.zero_stage == "auto" else (plan.zero_stage,)
    for stage in stages:
        if stage == 0 and work.accumulation_dtype != work.precision:
            continue  # DeepSpeed has no ZeRO-0 with 16-bit weights and fp32 accumulation
        if pinned is not None:
            shares: tuple[float, ...] = (pinned,)
        elif cluster.accelerator.kind == "cpu" or stage == 0:
            shares = (0.0,)
        elif stage == 3 and config.train.optimizer == "adamw":
            shares = (0.0, *OFFLOAD_RATIOS)
        else:
            shares = (0.0, 1.0)
        for share in shares:
            if (share and stage == 0) or (0 < share < 1 and stage != 3):
                continue
            for offload_param in _param_offloads(config, cluster, stage, share):
                yield stage, share, offload_param


def _param_offloads(config: Config, cluster: Cluster, stage: Stage, share: float) -> tuple[bool, ...]:
    asked = config.plan.offload_param
    if asked != "auto":
        return (asked,) if stage == 3 or not asked else ()
    return (False, True) if stage == 3 and share == 1 and cluster.accelerator.kind == "cuda" else (False,)


def _batches(config: Config, work: Workload, cluster: Cluster) -> Iterator[tuple[int, int]]:
    """(micro-batch, accumulation): rows of a rank's share in equal pieces; empty rows fill up what does not divide."""
    plan, ranks = config.plan, cluster.world_size
    share = ceil(work.global_batch_size / ranks)
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
                f"{ranks} ranks × {size} rows × {steps} are fewer than the {work.global_batch_size} rows of a global batch",
                f"use {needed}, a larger plan.micro_batch_size_per_gpu or a smaller train.global_batch_size",
            )
        yield size, steps


def fewest_layers(work: Workload, strategy: Strategy, cluster: Cluster) -> int:
    """The fewest checkpointed layers that fit the device; all of them if none fit."""
    limit, low, high = memory.budget(cluster), 0, work.shape.num_layers

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
    device = memory.device_memory(work, strategy, cluster)
    host = memory.host_memory_per_node(work, strategy, cluster)
    seconds = timing.step_time(work, strategy, cluster).total
    return Candidate(
        strategy, device, host, seconds, device.peak <= memory.budget(cluster), host <= memory.host_budget(cluster)
    )


def choose(config: Config, work: Workload, cluster: Cluster, candidates: list[Candidate]) -> Candidate:
    """The fastest that fits; among the equally fast the one with the least machinery, then the least memory."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        raise nothing_fits(config, work, cluster, candidates)
    fastest = min(candidate.seconds for candidate in fitting)
    return min(
        (candidate for candidate in fitting if candidate.seconds <= EQUALLY_FAST * fastest),
        key=lambda one: (
            one.strategy.offload_param,
            one.strategy.offload_optimizer,
            one.strategy.zero_stage,
            one.strategy.checkpointed_layers,
            one.device.peak,
        ),
    )


def nothing_fits(config: Config, work: Workload, cluster: Cluster, candidates: list[Candidate]) -> Exception:
    """`UserError` for a pin that forbids what would fit, else `NoPlanFits` with the cheapest change that would do."""
    nearest = min(
        candidates,
        key=lambda one: (
            max(0, one.device.peak - memory.budget(cluster)) + max(0, one.host_bytes - memory.host_budget(cluster))
        ),
    )
    pins = {name: value for name, value in config.plan.model_dump().items() if value != "auto"}
    for name in pins:
        without = config.model_copy(update={"plan": config.plan.model_copy(update={name: "auto"})})
        if any(evaluate(work, strategy, cluster).fits for strategy in search_space(without, work, cluster)):
            return UserError(
                f"plan.{name}", pins[name], shortfall(nearest, cluster), f"remove plan.{name}: without it a plan fits"
            )
    lines = [f"{one.strategy.name}: {shortfall(one, cluster)}" for one in best_of_families(candidates)]
    return NoPlanFits(lines, cheapest_change(config, work, cluster))


def shortfall(one: Candidate, cluster: Cluster) -> str:
    """``needs 93.1 of 80.0 GiB at 1 × 4096``: the figure that makes a candidate impossible."""
    accelerator, s = cluster.accelerator, one.strategy
    at = f"with a micro-batch of {s.micro_batch_size} and {s.checkpointed_layers} checkpointed layers"
    if not one.fits_device:
        what = "host memory a rank" if accelerator.kind == "cpu" else accelerator.name
        usable = f"{gib(memory.budget(cluster))} usable of {gib(accelerator.memory_bytes)}"
        return f"needs {gib(one.device.peak)}, {usable} ({what}), {at}"
    usable = f"{gib(memory.host_budget(cluster))} usable of {gib(cluster.host_memory_bytes)}"
    return f"needs {gib(one.host_bytes)} of host memory a node, {usable}"


def cheapest_change(config: Config, work: Workload, cluster: Cluster) -> str:
    """The first of the usual remedies that makes something fit: LoRA, shorter rows, more devices, more host memory."""

    def fits(changed: Workload, on: Cluster) -> bool:
        return any(evaluate(changed, strategy, on).fits for strategy in search_space(config, changed, on))

    if config.method == "full":
        trainable = work.shape.lora_parameters(config.lora.r, config.lora.target_modules)
        if fits(replace(work, trainable=trainable, frozen=work.shape.parameters, lora_rank=config.lora.r), cluster):
            return f"--set method=lora trains {trainable:,} parameters instead of {work.trainable:,}"
    length = work.max_length // 2
    while length >= 128:
        if fits(replace(work, max_length=length, document_length=min(work.document_length, length)), cluster):
            return f"--set train.max_length={length}"
        length //= 2
    for factor in (2, 4, 8, 16, 32, 64, 128):
        if fits(work, cluster.model_copy(update={"nodes": cluster.nodes * factor})):
            return f"{factor} times as many machines ({cluster.nodes * factor} × {cluster.devices_per_node} × {cluster.accelerator.name})"
        if fits(work, cluster.model_copy(update={"host_memory_bytes": cluster.host_memory_bytes * factor})):
            return f"{gib(cluster.host_memory_bytes * factor)} of host memory a machine"
    return "a smaller model"


def best_of_families(candidates: list[Candidate]) -> list[Candidate]:
    """The best candidate of each family (stage, offloaded or not): one that fits and is fast, else the one nearest to fitting."""
    families: dict[tuple[int, bool, bool], list[Candidate]] = {}
    for one in candidates:
        key = (one.strategy.zero_stage, one.strategy.offload_optimizer > 0, one.strategy.offload_param)
        families.setdefault(key, []).append(one)
    return [
        min(family, key=lambda one: (not one.fits, one.seconds if one.fits else one.device.peak + one.host_bytes))
        for _, family in sorted(families.items())
    ]


def rejected_families(
    work: Workload, cluster: Cluster, candidates: list[Candidate], best: Candidate
) -> list[Alternative]:
    """Every family but the winner's, with the figure that rejected it."""
    lost: list[Alternative] = []
    for one in best_of_families(candidates):
        same = one.strategy.name == best.strategy.name
        if same or (
            one.strategy.zero_stage == best.strategy.zero_stage
            and bool(one.strategy.offload_optimizer) == bool(best.strategy.offload_optimizer)
            and one.strategy.offload_param == best.strategy.offload_param
        ):
            continue
        if not one.fits:
            reason = shortfall(one, cluster)
        elif one.seconds > EQUALLY_FAST * best.seconds:
            reason = f"{one.seconds:.3g} s a step against {best.seconds:.3g}"
        else:
            reason = f"as fast ({one.seconds:.3g} s a step), but with more machinery"
        lost.append(Alternative(name=one.strategy.name, reason=reason))
    return lost


def explain_strategy(
    config: Config, work: Workload, cluster: Cluster, best: Candidate, candidates: list[Candidate]
) -> list[Decision]:
    """One reason per choice of the winner."""
    plan, s, ranks = config.plan, best.strategy, cluster.world_size
    used = f"{gib(best.device.peak)} of {gib(cluster.accelerator.memory_bytes)} a rank, at its peak in the {best.device.phase} phase"
    lower = [
        one
        for one in best_of_families(candidates)
        if one.strategy.zero_stage < s.zero_stage and not one.strategy.offload_optimizer
    ]
    if lower and not lower[-1].fits:
        why = f"ZeRO-{lower[-1].strategy.zero_stage} {shortfall(lower[-1], cluster)}"
    elif lower:
        why = f"fastest that fits ({best.seconds:.3g} s a step; ZeRO-{lower[-1].strategy.zero_stage} {lower[-1].seconds:.3g} s)"
    else:
        why = f"the lowest stage possible here, so the least communication; {used}"
    rows = ranks * s.micro_batch_size * s.accumulation_steps
    empty = rows - work.global_batch_size
    waste = f"; {empty} of {rows} rows are empty, to fill up {ranks} ranks" if empty > 0 else ""
    batch = f"{ranks} ranks × {s.micro_batch_size} × {s.accumulation_steps} = the {work.global_batch_size} rows of a global batch{waste}"
    layers = work.shape.num_layers
    if not s.checkpointed_layers:
        recompute = f"all activations fit: {used}"
    else:
        recompute = f"{s.checkpointed_layers} of {layers} layers recompute, the fewest that fit: {used}"

    def made(name: str, value: object, reason: str) -> Decision:
        pinned = getattr(plan, name) != "auto"
        return defaults.decide(f"plan.{name}", value, f"as set; {reason}" if pinned else reason, pinned=pinned)

    offload = (
        "everything fits on the device"
        if not s.offload_optimizer
        else f"the device alone is too small; host memory {gib(best.host_bytes)} a node"
    )
    return [
        made("zero_stage", s.zero_stage, why),
        made("offload_optimizer", s.offload_optimizer, offload),
        made(
            "offload_param",
            s.offload_param,
            "parameters stay on the device" if not s.offload_param else "parameters do not fit on the device",
        ),
        made("micro_batch_size_per_gpu", s.micro_batch_size, batch),
        made("gradient_accumulation_steps", s.accumulation_steps, batch),
        made("checkpointed_layers", s.checkpointed_layers, recompute),
    ]


def prediction(work: Workload, one: Candidate, *, total_steps: int, keep: int, data: defaults.DataFacts) -> Prediction:
    """What the chosen strategy is expected to take."""
    checkpoint = memory.checkpoint_bytes(work, one.strategy)
    tokens = work.global_batch_size * work.max_length * min(1.0, data.tokens / (data.rows * work.max_length))
    # The newest is written before the oldest is deleted; the export holds the weights once more.
    disk = (keep + 1) * checkpoint + work.parameter_bytes * work.parameters + 8 * data.tokens
    return Prediction(
        gpu_memory_bytes=one.device.peak,
        gpu_memory_parts=one.device.parts,
        host_memory_bytes_per_node=one.host_bytes,
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
        step_seconds=one.seconds,
        tokens_per_second=tokens / one.seconds,
        total_seconds=total_steps * one.seconds,
    )
