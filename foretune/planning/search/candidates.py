"""Strategies with their figures: which fit, which is fastest, which is the best of its kind.

Of candidates within 2 % of the fastest, the one with the least machinery and memory wins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from foretune.artifacts import Cluster
from foretune.planning.predict import host, memory, timing
from foretune.planning.predict.memory import DeviceMemory
from foretune.planning.predict.timing import StepTime
from foretune.planning.strategy import Strategy, Workload

#: Candidates this near to the fastest count as equally fast.
EQUALLY_FAST = 1.02
#: Formats of the optimizer's states by what they keep: bf16 masters round small updates away, 8 bits do not.
_EXACT_FIRST = ("fp32", "8bit", "bf16")


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


def work_for(work: Workload, strategy: Strategy) -> Workload:
    """The work as a strategy does it: a bf16 master is stepped with gradients that are summed in bf16."""
    bf16_masters = strategy.optimizer_dtype == "bf16"
    return replace(work, accumulation_dtype=work.precision) if bf16_masters else work


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
            _EXACT_FIRST.index(one.strategy.optimizer_dtype),
            one.strategy.offload_param,
            one.strategy.offload_optimizer > 0 and not one.strategy.streamed,
            one.strategy.offload_optimizer,
            one.strategy.mlp_tile_rows > 0,
            one.strategy.zero_stage,
            one.strategy.checkpointed_layers,
            one.strategy.recompute_pointwise,
            one.strategy.keep_attention,
            -one.strategy.loss_chunk_tokens,
            one.device.peak,
        ),
    )


def family_of(one: Candidate) -> tuple[int, bool, bool, bool, bool, str]:
    """Stage, what is offloaded and where to, the optimizer's format: what people call a configuration."""
    s = one.strategy
    return s.zero_stage, s.offload_optimizer > 0, s.streamed, s.offload_param, s.nvme, s.optimizer_dtype


def best_of_families(candidates: list[Candidate]) -> list[Candidate]:
    """The best of each family: the fastest that fits, else the one nearest to fitting."""
    families: dict[tuple[bool | int | str, ...], list[Candidate]] = {}
    for one in candidates:
        families.setdefault(family_of(one), []).append(one)
    return [
        min(family, key=lambda one: (not one.fits, one.seconds if one.fits else one.device.peak + one.host_bytes))
        for _, family in sorted(families.items())
    ]
