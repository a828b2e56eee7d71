"""The planner: shape, cluster and configuration in, `Plan` out, with a reason for every choice.

    what is to be computed (precision, batch, rates) ──▶ Workload ──search──▶ how (stage, offload, …) ──▶ Plan

The first half is `foretune.planning.mathematics`. Kernels are chosen before the search, because they decide what is
kept for backward; compiling is given up afterwards if the run is too short to pay for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from foretune.artifacts import Cluster, Decision, Plan, Prediction, PreparedDataset
from foretune.config import Config
from foretune.errors import UserError
from foretune.model.shape import ModelShape, read_shape
from foretune.planning import explain, mend, search
from foretune.planning import mathematics as maths
from foretune.planning.deepspeed_config import deepspeed_config
from foretune.planning.kernels import COMPILING_SECONDS, choose_attention, choose_compile, choose_sum_in_matmul
from foretune.planning.mathematics import DataEstimate, DataFacts, decide
from foretune.planning.predict import host
from foretune.planning.predict.arithmetic import derivations
from foretune.planning.predict.calibration import Calibration
from foretune.planning.predict.timing import flops_per_row, starting_seconds
from foretune.planning.search import Candidate
from foretune.planning.shapes import known_shape, nearest_names
from foretune.planning.strategy import Precision, Strategy, Workload, gib

#: Rows that are not packed are padded to the longest of their micro-batch.
_PADDED = 1.25


@dataclass(frozen=True)
class _Layout:
    """The outcome of the search: the workload with its kernels, every candidate, the winner."""

    work: Workload
    candidates: list[Candidate]
    best: Candidate
    attention: Decision
    compiling: Decision


def make_plan(
    config: Config,
    *,
    model_folder: Path | str,
    cluster: Cluster,
    prepared: PreparedDataset | None,
    tokens: int | None = None,
    estimate: DataEstimate | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Decide everything that was left open.

    Args:
        model_folder: a folder with a config.json, or a name from the built-in table of public models.
        tokens: of one epoch, where there is no prepared data.
        estimate: of data that is not prepared, from a sample of its rows.
        calibration: what earlier runs on this machine measured.

    Raises:
        UserError: a pin or setting that cannot be, with the figures and its field.
        NoPlanFits: nothing fits, and nothing was pinned that forbids it.
    """
    shape = shape_for(model_folder)
    _refuse_quantised(config, shape, str(model_folder))
    data = maths.data_facts(config, shape, prepared, tokens, estimate)
    precision = maths.choose_precision(config, cluster)
    accumulation = maths.choose_accumulation_dtype(config, precision.value)
    batch = maths.choose_global_batch(config, data)
    work = workload(config, shape, data, precision=precision.value, accumulation=accumulation.value, packs=batch.value)
    per_epoch, total = maths.steps_of(config, data, batch.value)
    if calibration is not None:
        work = replace(work, pace=calibration.pace(cluster, config.method))
    search.refuse_impossible_pins(config, work, cluster)
    layout = _lay_out(config, work, cluster, total_steps=total)
    work, best, chosen = layout.work, layout.best, layout.best.strategy
    if chosen.bf16_states:
        accumulation = decide(accumulation.field, work.precision, "a bf16 master is stepped with bf16 gradients")
    rate = maths.choose_learning_rate(config, shape.parameters)
    saved = host.checkpoint_bytes(work, chosen)
    every = maths.choose_checkpoint_every(config, total, step_seconds=best.seconds, checkpoint_bytes=saved)
    length = decide("train.max_length", data.max_length, data.length_reason)
    mathematics = [precision, accumulation, batch, length, rate]
    how = explain.explain_strategy(config, work, cluster, best, layout.candidates)
    inside = choose_sum_in_matmul(config, search.work_for(work, chosen), cluster, chosen)
    kernels, notes = [layout.attention, layout.compiling, inside], _notes(shape, cluster, data)
    snapshot = _snapshot_decision(work, chosen, cluster)
    pace = [] if calibration is None else calibration.decisions(cluster, config.method, chosen.zero_stage)
    tokens_of_step = batch.value * data.tokens / data.packs
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
        offload_optimizer_step="device" if chosen.streamed else "host",
        offload_param=chosen.offload_param,
        optimizer_dtype="bf16" if chosen.bf16_states else "fp32",
        micro_batch_size_per_gpu=chosen.micro_batch_size,
        gradient_accumulation_steps=chosen.accumulation_steps,
        gradient_accumulation_dtype=accumulation.value,
        checkpointed_layers=chosen.checkpointed_layers,
        loss_chunk_tokens=chosen.loss_chunk_tokens,
        attention=layout.attention.value,
        compile_layers=layout.compiling.value,
        sum_in_matmul=inside.value,
        global_batch_size=batch.value,
        max_length=data.max_length,
        packing=config.data.packing,
        learning_rate=rate.value,
        optimizer=config.train.optimizer,
        schedule=config.train.schedule,
        warmup_steps=maths.warmup_steps_of(config, total),
        total_steps=total,
        steps_per_epoch=per_epoch,
        checkpoint_every=every.value,
        deepspeed_config=deepspeed_config(
            search.work_for(work, chosen), chosen, cluster, train=config.train, nvme_path=config.plan.nvme_path
        ),
        decisions=[*mathematics, *how, *kernels, every, *snapshot, *pace, *notes],
        predicted=prediction(
            work, best, cluster, tokens=tokens_of_step, total_steps=total, keep=_kept(config), data=data
        ),
        rejected=explain.rejected_families(work, cluster, layout.candidates, best, tokens=tokens_of_step),
        arithmetic=derivations(search.work_for(work, chosen), chosen, cluster),
    )


def _lay_out(config: Config, work: Workload, cluster: Cluster, *, total_steps: int) -> _Layout:
    """Search with the kernels that are best for a step; without compiled layers if so few steps do not pay for them."""
    attention = choose_attention(config, work, cluster)
    pinned_stage = config.plan.zero_stage
    compiling = choose_compile(config, cluster, zero_stage=None if pinned_stage == "auto" else pinned_stage)
    work = replace(work, attention=attention.value, compiled=compiling.value)
    candidates, best = _search(config, work, cluster)
    if best is None:
        raise mend.nothing_fits(config, work, cluster, candidates)
    stage = best.strategy.zero_stage
    if not compiling.value or compiling.pinned or stage == 3:
        compiling = choose_compile(config, cluster, zero_stage=stage)  # refuses compiled layers at ZeRO-3
        return _Layout(replace(work, compiled=compiling.value), candidates, best, attention, compiling)
    plain = replace(work, compiled=False)
    plain_candidates, plain_best = _search(config, plain, cluster)
    if plain_best is None:
        return _Layout(work, candidates, best, attention, compiling)
    gain = total_steps * (plain_best.seconds - best.seconds)
    if gain > COMPILING_SECONDS:
        return _Layout(work, candidates, best, attention, compiling)
    reason = f"it takes {COMPILING_SECONDS:.0f} s once and would save {max(gain, 0.0):.1f} s of this run"
    return _Layout(plain, plain_candidates, plain_best, attention, decide(compiling.field, False, reason))


def _search(config: Config, work: Workload, cluster: Cluster) -> tuple[list[Candidate], Candidate | None]:
    candidates = [search.evaluate(work, strategy, cluster) for strategy in search.search_space(config, work, cluster)]
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
        offload_param=plan.offload_param,
        loss_chunk_tokens=plan.loss_chunk_tokens,
        reduce_bucket_size=zero.get("reduce_bucket_size", 0),
        sub_group_size=zero.get("sub_group_size", 1),
        bf16_states=plan.optimizer_dtype == "bf16",
        nvme=zero.get("offload_optimizer", {}).get("device") == "nvme",
    )
    return replace(work, attention=plan.attention, compiled=plan.compile_layers), strategy


def _refuse_quantised(config: Config, shape: ModelShape, model: str) -> None:
    if shape.quantised is None:
        return
    why = f"its weights are quantised ({shape.quantised}); full training has no use for them"
    if config.method == "lora":
        why = f"its weights are quantised ({shape.quantised}), and DeepSpeed cannot partition those (QLoRA at ZeRO-3)"
        if config.plan.zero_stage != 3:
            why = f"its weights are quantised ({shape.quantised}), and foretune trains adapters on whole weights only"
    raise UserError("model", model, why, "give the model it was made from")


def _snapshot_decision(work: Workload, strategy: Strategy, cluster: Cluster) -> list[Decision]:
    """Whether checkpoints can be written behind the training: they lie in host memory meanwhile."""
    size = gib(host.snapshot_bytes(work, strategy, cluster))
    if host.snapshot_fits(work, strategy, cluster):
        return [decide("checkpoint", "behind training", f"a copy of {size} a machine waits in host memory meanwhile")]
    return [decide("checkpoint", "training waits", f"host memory has no room for a copy of {size} a machine")]


def shape_for(model_folder: Path | str) -> ModelShape:
    """The shape of a folder, or of a public model by name where there is no such folder."""
    if isinstance(model_folder, str) and not Path(model_folder).exists():
        known = known_shape(model_folder)
        if known is not None:
            return known
        if near := nearest_names(model_folder):
            raise UserError(
                "model",
                model_folder,
                "there is no such folder, and the built-in table has no model of that name",
                f"did you mean {' or '.join(near)}? Otherwise give a folder with a config.json",
            )
    return read_shape(model_folder)


def _notes(shape: ModelShape, cluster: Cluster, data: DataFacts) -> list[Decision]:
    """What the reader should know that nobody chose."""
    notes = [decide("hardware", cluster.accelerator.name, note) for note in cluster.notes]
    notes.append(decide("data", data.tokens, data.source))
    if shape.estimated:
        notes.append(
            decide("model", shape.family, "this family is not known: its parameters are estimated as a llama's")
        )
    return notes


def workload(
    config: Config, shape: ModelShape, data: DataFacts, *, precision: Precision, accumulation: Precision, packs: int
) -> Workload:
    """The work of one step of this configuration."""
    if config.method == "lora":
        trainable, frozen = shape.lora_parameters(config.lora.r, config.lora.target_modules), shape.parameters
    else:
        trainable, frozen = shape.parameters, 0
    packing = config.data.packing
    states = 8 if config.train.optimizer != "sgd" else (4 if config.train.momentum else 0)
    return Workload(
        shape=shape,
        trainable=trainable,
        frozen=frozen,
        lora_rank=config.lora.r if frozen else 0,
        precision=precision,
        accumulation_dtype=accumulation,
        optimizer_state_bytes=states,
        max_length=data.max_length,
        row_length=float(data.max_length) if packing else min(data.max_length, _PADDED * data.document_length),
        rows=packs if packing else ceil(packs * data.documents / data.packs),
        document_length=data.document_length,
        packing=packing,
        equal_documents=data.equal_documents,
    )


def _kept(config: Config) -> int:
    """Checkpoints on disk at a time; those of `checkpoint.keep_every` come on top."""
    return config.checkpoint.keep + config.checkpoint.keep_best


def prediction(
    work: Workload,
    one: Candidate,
    cluster: Cluster,
    *,
    tokens: float,
    total_steps: int,
    keep: int,
    data: DataFacts,
) -> Prediction:
    """What the chosen strategy is expected to take; `tokens` of a step."""
    checkpoint = host.checkpoint_bytes(work, one.strategy)
    # The newest is written before the oldest is deleted; the export holds the weights once more.
    disk = (keep + 1) * checkpoint + work.parameter_bytes * work.parameters + 8 * data.tokens
    host_parts = host.host_parts(work, one.strategy, cluster)
    if host.snapshot_fits(work, one.strategy, cluster):
        host_parts["snapshot of a checkpoint"] = host.snapshot_bytes(work, one.strategy, cluster)
    total_seconds = total_steps * one.seconds + starting_seconds(work, one.strategy, cluster)
    flops = work.rows * flops_per_row(work) / (one.seconds * cluster.world_size)
    device_hours = cluster.world_size * total_seconds / 3600
    price, watts = cluster.price_per_hour, cluster.accelerator.watts
    return Prediction(
        gpu_memory_bytes=one.device.peak,
        gpu_memory_parts=one.device.parts,
        peak_phase=one.device.phase,
        host_memory_bytes_per_node=sum(host_parts.values()),
        host_memory_parts=host_parts,
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
        step_seconds=one.seconds,
        step_parts=one.time.parts,
        tokens_per_second=tokens / one.seconds,
        total_seconds=total_seconds,
        mfu=flops / cluster.accelerator.peak_flops,
        energy_kwh=device_hours * watts / 1000 if price is not None and watts else None,
        cost=None if price is None else device_hours * price,
    )
