"""How the work is done: kernels and search in, `Layout` out; from a strategy to the fields of a plan, and back.

Kernels are chosen before the search, because they decide what is kept for backward; compiling is given up afterwards if
the run is too short to pay for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from foretune.artifacts import Cluster, Decision, Plan
from foretune.config import Config
from foretune.model.shape import ModelShape
from foretune.planning import mend, search
from foretune.planning.kernels import (
    COMPILING_SECONDS,
    FUSING_SECONDS,
    choose_attention,
    choose_compile,
    choose_fp8,
    choose_fused_mlp,
    choose_fused_qkv,
    choose_sum_in_matmul,
    fuses_mlp_from,
    has_flash_attention_4,
    has_softmax_in_place,
    may_sum_in_matmul,
    refuse_fused_qkv,
)
from foretune.planning.mathematics import DataFacts, decide, workload
from foretune.planning.search import Candidate
from foretune.planning.strategy import Strategy, Workload, fuses_mlp


@dataclass(frozen=True)
class Layout:
    """The outcome of the search: the workload with its kernels, every candidate, the winner."""

    work: Workload
    candidates: list[Candidate]
    best: Candidate
    attention: Decision
    compiling: Decision
    eight_bits: Decision
    summing: Decision
    fusing: Decision
    joining: Decision
    vectors_apart: bool

    @property
    def kernels(self) -> list[Decision]:
        return [self.attention, self.compiling, self.eight_bits, self.summing, self.fusing, self.joining]

    def plan_fields(self) -> dict[str, Any]:
        """Fields of `Plan` that say how; `work_and_strategy` reads them."""
        chosen = self.best.strategy
        return {
            "zero_stage": chosen.zero_stage,
            "offload_optimizer": chosen.offload_optimizer,
            "offload_optimizer_step": "device" if chosen.streamed else "host",
            "offload_param": chosen.offload_param,
            "optimizer_dtype": chosen.optimizer_dtype,
            "micro_batch_size_per_gpu": chosen.micro_batch_size,
            "gradient_accumulation_steps": chosen.accumulation_steps,
            "checkpointed_layers": chosen.checkpointed_layers,
            "loss_chunk_tokens": chosen.loss_chunk_tokens,
            "mlp_tile_rows": chosen.mlp_tile_rows,
            "recompute_pointwise": chosen.recompute_pointwise,
            "keep_attention": chosen.keep_attention,
            "attention": self.attention.value,
            "compile_layers": self.compiling.value,
            "fp8": self.eight_bits.value,
            "sum_in_matmul": self.summing.value,
            "fused_mlp": self.fusing.value,
            "fused_qkv": self.joining.value,
            "vectors_apart": self.vectors_apart,
        }


def lay_out(
    config: Config, work: Workload, cluster: Cluster, *, total_steps: int, vectors_apart: bool | None = None
) -> Layout:
    """Search with the kernels that are best for a step; without compiled layers if so few steps do not pay for them.

    Args:
        vectors_apart: `Checkpoint.vectors_apart` of a training that has begun; None before.

    Raises:
        UserError, NoPlanFits: nothing fits.
    """
    attention, eight_bits = choose_attention(config, work, cluster), choose_fp8(config, work, cluster)
    summing = may_sum_in_matmul(config, work, cluster, fp8=eight_bits.value)
    fast_attention = attention.value == "packed" and has_flash_attention_4(work, cluster)
    work = replace(work, attention=attention.value, flash_attention_4=fast_attention)
    work = replace(work, fp8=eight_bits.value, sums_inside=summing)
    refuse_fused_qkv(config, work)
    work = replace(work, softmax_in_place=has_softmax_in_place(work, cluster))
    work = replace(work, fused_mlp_from=fuses_mlp_from(config, work, cluster))
    compiling, work, candidates, best = _compiled_or_not(config, work, cluster, total_steps=total_steps)
    chosen = best.strategy
    done = search.work_for(work, chosen)
    joining = choose_fused_qkv(config, done, chosen, vectors_apart=vectors_apart)
    return Layout(
        work=work,
        candidates=candidates,
        best=best,
        attention=attention,
        compiling=compiling,
        eight_bits=eight_bits,
        summing=choose_sum_in_matmul(config, done, cluster, chosen, fp8=eight_bits.value),
        fusing=choose_fused_mlp(config, done, cluster, chosen),
        joining=joining,
        vectors_apart=joining.value if vectors_apart is None else vectors_apart,
    )


def _compiled_or_not(
    config: Config, work: Workload, cluster: Cluster, *, total_steps: int
) -> tuple[Decision, Workload, list[Candidate], Candidate]:
    """The decision, and the workload, candidates and winner with it."""
    pinned_stage = config.plan.zero_stage
    compiling = choose_compile(config, cluster, zero_stage=None if pinned_stage == "auto" else pinned_stage)
    work = replace(work, compiled=compiling.value)
    candidates, best = _search(config, work, cluster)
    if best is None:
        raise mend.nothing_fits(config, work, cluster, candidates)
    stage = best.strategy.zero_stage
    if not compiling.value or stage == 3:
        compiling = choose_compile(config, cluster, zero_stage=stage)  # refuses compiled layers at ZeRO-3
        return compiling, replace(work, compiled=compiling.value), candidates, best
    ways = [(work, candidates, best)]
    if fuses_mlp(work, best.strategy) and config.plan.fused_mlp == "auto":
        ways += _way(config, replace(work, fused_mlp_from=None), cluster)
    if not compiling.pinned:
        ways += _way(config, replace(work, compiled=False), cluster)
    whole = [total_steps * one.seconds + _compiling_seconds(did, one) for did, _, one in ways]
    number = max(range(len(ways)), key=lambda index: (-whole[index], index))  # of equals the one with less to compile
    work, candidates, chosen = ways[number]
    if not work.compiled:
        gain = total_steps * (chosen.seconds - ways[-2][2].seconds)
        reason = f"it takes {COMPILING_SECONDS:.0f} s once and would save {max(gain, 0.0):.1f} s of this run"
        compiling = decide(compiling.field, False, reason)
    return compiling, work, candidates, chosen


def _way(config: Config, work: Workload, cluster: Cluster) -> list[tuple[Workload, list[Candidate], Candidate]]:
    """The work, its candidates and its winner; nothing where none is left."""
    candidates, best = _search(config, work, cluster)
    return [] if best is None else [(work, candidates, best)]


def _compiling_seconds(work: Workload, best: Candidate) -> float:
    """What the first step takes longer, once on a machine."""
    fused = fuses_mlp(work, best.strategy)
    return (COMPILING_SECONDS if work.compiled else 0.0) + (FUSING_SECONDS if fused else 0.0)


def _search(config: Config, work: Workload, cluster: Cluster) -> tuple[list[Candidate], Candidate | None]:
    candidates = list(search.search_space(config, work, cluster))
    return candidates, search.fastest(candidates)


def work_and_strategy(config: Config, plan: Plan, shape: ModelShape) -> tuple[Workload, Strategy]:
    """What a plan was computed from: for those who compute more of it."""
    rows = plan.global_batch_size
    data = DataFacts(plan.max_length, rows, rows, rows * plan.max_length, float(plan.max_length), "", "")
    work = workload(
        config, shape, data, precision=plan.precision, accumulation=plan.gradient_accumulation_dtype, packs=rows
    )
    zero = plan.deepspeed_config["zero_optimization"]
    strategy = Strategy(
        zero_stage=plan.zero_stage,
        micro_batch_size=plan.micro_batch_size_per_gpu,
        accumulation_steps=plan.gradient_accumulation_steps,
        checkpointed_layers=plan.checkpointed_layers,
        offload_optimizer=plan.offload_optimizer,
        streamed=plan.streams_optimizer,
        mlp_tile_rows=plan.mlp_tile_rows,
        recompute_pointwise=plan.recompute_pointwise,
        keep_attention=plan.keep_attention,
        offload_param=plan.offload_param,
        loss_chunk_tokens=plan.loss_chunk_tokens,
        reduce_bucket_size=zero.get("reduce_bucket_size", 0),
        sub_group_size=zero.get("sub_group_size", 1),
        optimizer_dtype=plan.optimizer_dtype,
        nvme=plan.swaps_to_nvme,
    )
    work = replace(work, attention=plan.attention, compiled=plan.compile_layers, sums_inside=plan.sum_in_matmul)
    return replace(work, fp8=plan.fp8, fused_mlp_from=0 if plan.fused_mlp else None), strategy
