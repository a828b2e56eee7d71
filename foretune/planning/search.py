"""The search: which layouts there are, which fit, which is fastest, and the figures that made the others lose.

    stage × offload × micro-batch × checkpointed layers ──memory──▶ those that fit ──time──▶ the fastest

For each stage, offload and micro-batch the fewest checkpointed layers that fit are found by bisection: each costs time
and frees memory, so nothing between is worth looking at. Of candidates within 2 % of the fastest, the one with the
least machinery and memory wins. Pins narrow the search; what they forbid is refused with figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from foretune.artifacts import Alternative, Cluster, Decision
from foretune.config import Config
from foretune.errors import NoPlanFits, UserError
from foretune.planning import memory, timing
from foretune.planning.memory import DeviceMemory
from foretune.planning.strategy import Stage, Strategy, Workload, gib

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
    if share is not None and 0 < share < 1 and cluster.accelerator.kind == "cpu":
        raise UserError(
            "plan.offload_optimizer", share, "on a CPU there is no device to share the optimizer with", "remove the key"
        )
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
        elif cluster.accelerator.kind == "cpu" or stage <= 1:
            shares = (0.0,)  # ZeRO-1 keeps whole gradients on the device: ZeRO-2 offloads the same with less
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


def nothing_fits(
    config: Config, work: Workload, cluster: Cluster, candidates: list[Candidate]
) -> UserError | NoPlanFits:
    """`UserError` for a pin that forbids what would fit, else `NoPlanFits` with the cheapest change that would do."""
    over = {id(one): _bytes_over(one, cluster) for one in candidates}
    nearest = min(candidates, key=lambda one: over[id(one)])
    pins = {name: value for name, value in config.plan.model_dump().items() if value != "auto"}
    for freed in [*([name] for name in pins), list(pins)]:
        plan = config.plan.model_copy(update=dict.fromkeys(freed, "auto"))
        free = config.model_copy(update={"plan": plan})
        if freed and any(evaluate(work, one, cluster).fits for one in search_space(free, work, cluster)):
            what = " and ".join(f"plan.{name}" for name in freed)
            field = f"plan.{freed[0]}"
            return UserError(
                field, pins[freed[0]], shortfall(nearest, cluster), f"remove {what}: without it a plan fits"
            )
    lines = [f"{one.strategy.name}: {shortfall(one, cluster)}" for one in best_of_families(candidates)]
    return NoPlanFits(lines, cheapest_change(config, work, cluster))


def _bytes_over(one: Candidate, cluster: Cluster) -> int:
    device = max(0, one.device.peak - memory.budget(cluster))
    return device + max(0, one.host_bytes - memory.host_budget(cluster))


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
        if fits(
            replace(
                work,
                max_length=length,
                row_length=min(work.row_length, length),
                document_length=min(work.document_length, length),
            ),
            cluster,
        ):
            return f"--set train.max_length={length}"
        length //= 2
    accelerator, devices = cluster.accelerator.name, cluster.devices_per_node
    for factor in (2, 4, 8, 16, 32, 64, 128):
        more_memory = cluster.model_copy(update={"host_memory_bytes": cluster.host_memory_bytes * factor})
        if cluster.accelerator.kind == "cuda" and fits(work, more_memory):
            return f"{gib(more_memory.host_memory_bytes)} of host memory a machine"
        nodes = cluster.nodes * factor
        if fits(work, cluster.model_copy(update={"nodes": nodes})):
            return f"{factor} times as many machines ({nodes}x{devices}x{accelerator})"
    return "a smaller model"


def _family(one: Candidate) -> tuple[int, bool, bool]:
    s = one.strategy
    return s.zero_stage, s.offload_optimizer > 0, s.offload_param


def best_of_families(candidates: list[Candidate]) -> list[Candidate]:
    """The best of each family (stage, what is offloaded): the fastest that fits, else the one nearest to fitting."""
    families: dict[tuple[int, bool, bool], list[Candidate]] = {}
    for one in candidates:
        families.setdefault(_family(one), []).append(one)
    return [
        min(family, key=lambda one: (not one.fits, one.seconds if one.fits else one.device.peak + one.host_bytes))
        for _, family in sorted(families.items())
    ]


def rejected_families(cluster: Cluster, candidates: list[Candidate], best: Candidate) -> list[Alternative]:
    """Every family but the winner's, with the figure that rejected it."""
    lost: list[Alternative] = []
    for one in best_of_families(candidates):
        if _family(one) == _family(best):
            continue
        if not one.fits:
            reason = shortfall(one, cluster)
        elif one.seconds > EQUALLY_FAST * best.seconds:
            reason = f"fits, but takes {one.seconds:.3g} s a step against {best.seconds:.3g}"
        else:
            reason = f"as fast ({one.seconds:.3g} s a step), but with more machinery"
        lost.append(Alternative(name=one.strategy.name, reason=reason))
    return lost


def explain_strategy(
    config: Config, work: Workload, cluster: Cluster, best: Candidate, candidates: list[Candidate]
) -> list[Decision]:
    """One reason per choice of the winner."""
    s, layers = best.strategy, work.shape.num_layers
    fill = f"{gib(best.device.peak)} of {gib(cluster.accelerator.memory_bytes)} a rank, most in the {best.device.phase}"
    recompute = (
        f"{s.checkpointed_layers} of {layers} layers, the fewest that fit" if s.checkpointed_layers else "all fit"
    )
    host = f"the device alone is too small; {gib(best.host_bytes)} of host memory a machine"
    batch = _explain_batch(work, cluster, s)
    reasons: dict[str, tuple[object, str]] = {
        "zero_stage": (s.zero_stage, _explain_stage(cluster, best, candidates)),
        "offload_optimizer": (s.offload_optimizer, host if s.offload_optimizer else "the optimizer fits on the device"),
        "offload_param": (s.offload_param, host if s.offload_param else "the parameters fit on the device"),
        "micro_batch_size_per_gpu": (s.micro_batch_size, batch),
        "gradient_accumulation_steps": (s.accumulation_steps, batch),
        "checkpointed_layers": (s.checkpointed_layers, f"activations: {recompute}; {fill}"),
    }
    decisions = []
    for name, (value, reason) in reasons.items():
        pinned = getattr(config.plan, name) != "auto"
        text = f"as set; {reason}" if pinned else reason
        decisions.append(Decision(field=f"plan.{name}", value=value, reason=text, pinned=pinned))
    return decisions


def _explain_stage(cluster: Cluster, best: Candidate, candidates: list[Candidate]) -> str:
    """Why not the stage below: it does not fit, or it is slower."""
    lower = [one for one in best_of_families(candidates) if one.strategy.zero_stage < best.strategy.zero_stage]
    plain = [one for one in lower if not one.strategy.offload_optimizer]
    if not plain:
        return "the lowest stage that is possible here: the least communication"
    below = plain[-1]
    if below.fits:
        return f"{best.seconds:.3g} s a step; {below.strategy.name} takes {below.seconds:.3g}"
    return f"{below.strategy.name} {shortfall(below, cluster)}"


def _explain_batch(work: Workload, cluster: Cluster, s: Strategy) -> str:
    ranks, rows = cluster.world_size, work.rows
    places = ranks * s.micro_batch_size * s.accumulation_steps
    product = f"{ranks} ranks × {s.micro_batch_size} × {s.accumulation_steps}"
    if places == rows:
        return f"{product} = the {rows} rows of a batch"
    return f"{product} hold the {rows} rows of a batch; {places - rows} places stay empty"
