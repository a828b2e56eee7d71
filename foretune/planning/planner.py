"""The planner: shape, cluster and configuration in, `Plan` out, with a reason for every choice.

what is to be computed (`mathematics`) ──▶ Workload ──▶ how (`layout`: kernels, search) ──▶ Plan
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from foretune.artifacts import Cluster, Decision, Plan, Prediction, PreparedDataset
from foretune.config import Config
from foretune.errors import UserError
from foretune.model.shape import ModelShape, read_shape
from foretune.planning import explain, search
from foretune.planning import mathematics as maths
from foretune.planning.deepspeed_config import deepspeed_config
from foretune.planning.layout import lay_out
from foretune.planning.mathematics import DataEstimate, DataFacts, Mathematics, decide
from foretune.planning.predict import host
from foretune.planning.predict.arithmetic import derivations
from foretune.planning.predict.calibration import Calibration
from foretune.planning.predict.timing import flops_per_row
from foretune.planning.predict.updating import starting_seconds
from foretune.planning.search import Candidate
from foretune.planning.shapes import known_shape, nearest_names
from foretune.planning.strategy import Strategy, Workload, gib


def make_plan(
    config: Config,
    *,
    model_folder: Path | str,
    cluster: Cluster,
    prepared: PreparedDataset | None,
    tokens: int | None = None,
    estimate: DataEstimate | None = None,
    calibration: Calibration | None = None,
    vectors_apart: bool | None = None,
) -> Plan:
    """Decide everything that was left open.

    Args:
        model_folder: a folder with a config.json, or a name from the built-in table of public models.
        tokens: of one epoch, where there is no prepared data.
        estimate: of data that is not prepared, from a sample of its rows.
        calibration: what earlier runs on this machine measured.
        vectors_apart: of a training that has begun, which keeps it (`Checkpoint.vectors_apart`); None before.

    Raises:
        UserError: a pin or setting that cannot be, with the figures and its field.
        NoPlanFits: nothing fits, and nothing was pinned that forbids it.
    """
    shape = shape_for(model_folder)
    _refuse_quantised(config, shape, str(model_folder))
    wanted = maths.decide_mathematics(config, shape, cluster, prepared, tokens=tokens, estimate=estimate)
    work = maths.workload_of(config, shape, wanted)
    if calibration is not None:
        work = replace(work, pace=calibration.pace(cluster, config.method))
    search.refuse_impossible_pins(config, work, cluster)
    layout = lay_out(config, work, cluster, total_steps=wanted.total_steps, vectors_apart=vectors_apart)
    work, best, chosen = layout.work, layout.best, layout.best.strategy
    if chosen.optimizer_dtype == "bf16":
        wanted = wanted.with_16_bit_sums()
    saved = host.checkpoint_bytes(work, chosen)
    every = maths.choose_checkpoint_every(config, wanted.total_steps, step_seconds=best.seconds, checkpoint_bytes=saved)
    pace = [] if calibration is None else calibration.decisions(cluster, config.method, chosen.zero_stage)
    how = explain.explain_strategy(config, work, cluster, best, layout.candidates)
    snapshot = _snapshot_decision(work, chosen, cluster)
    done = search.work_for(work, chosen)
    return Plan(
        model=str(model_folder),
        method=config.method,
        parameters=shape.parameters,
        trainable_parameters=work.trainable,
        cluster=cluster,
        world_size=cluster.world_size,
        checkpoint_every=every.value,
        deepspeed_config=deepspeed_config(done, chosen, cluster, train=config.train, nvme_path=config.plan.nvme_path),
        decisions=[
            *wanted.decisions,
            *how,
            *layout.kernels,
            every,
            snapshot,
            *pace,
            *_notes(shape, cluster, wanted.data),
        ],
        predicted=prediction(config, work, best, cluster, wanted),
        rejected=explain.rejected_families(work, cluster, layout.candidates, best, tokens=wanted.tokens_of_step),
        arithmetic=derivations(done, chosen, cluster),
        **wanted.plan_fields(config),
        **layout.plan_fields(),
    )


def _refuse_quantised(config: Config, shape: ModelShape, model: str) -> None:
    if shape.quantised is None:
        return
    why = f"its weights are quantised ({shape.quantised}); full training has no use for them"
    if config.method == "lora":
        why = f"its weights are quantised ({shape.quantised}), and DeepSpeed cannot partition those (QLoRA at ZeRO-3)"
        if config.plan.zero_stage != 3:
            why = f"its weights are quantised ({shape.quantised}), and foretune trains adapters on whole weights only"
    raise UserError("model", model, why, "give the model it was made from")


def _snapshot_decision(work: Workload, strategy: Strategy, cluster: Cluster) -> Decision:
    """Whether checkpoints can be written behind the training: they lie in host memory meanwhile."""
    size = gib(host.snapshot_bytes(work, strategy, cluster))
    if host.snapshot_fits(work, strategy, cluster):
        return decide("checkpoint", "behind training", f"a copy of {size} a machine waits in host memory meanwhile")
    return decide("checkpoint", "training waits", f"host memory has no room for a copy of {size} a machine")


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


def prediction(config: Config, work: Workload, one: Candidate, cluster: Cluster, wanted: Mathematics) -> Prediction:
    """What the chosen strategy is expected to take."""
    # Checkpoints on disk at a time; those of `checkpoint.keep_every` come on top.
    keep, total_steps = config.checkpoint.keep + config.checkpoint.keep_best, wanted.total_steps
    checkpoint = host.checkpoint_bytes(work, one.strategy)
    # The newest is written before the oldest is deleted; the export holds the weights once more.
    disk = (keep + 1) * checkpoint + work.parameter_bytes * work.parameters + 8 * wanted.data.tokens
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
        tokens_per_second=wanted.tokens_of_step / one.seconds,
        total_seconds=total_seconds,
        mfu=flops / cluster.accelerator.peak_flops,
        energy_kwh=device_hours * watts / 1000 if price is not None and watts else None,
        cost=None if price is None else device_hours * price,
    )
