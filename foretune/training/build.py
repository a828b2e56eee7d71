"""Builds what the loop is given: engine, loader, hooks. Building is not looping."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foretune.artifacts import write_atomically
from foretune.checkpoint import layout, store
from foretune.checkpoint.snapshot import seed_everything
from foretune.data import Loader, open_loader
from foretune.engine import DeepSpeedEngine, EightBits, Engine, build_optimizer, partitioned_loading
from foretune.errors import MachineFault
from foretune.events import EventKind
from foretune.model import loading
from foretune.model.adapters import add_adapters, save_adapter_config
from foretune.model.lora import fuse_adapters
from foretune.model.loss import attach_loss
from foretune.model.tiling import tile_mlps
from foretune.training.assignment import Assignment
from foretune.training.hooks import AccountingHook, JournalHook, PeakCheckHook
from foretune.training.kernels import (
    CompileHook,
    apply_attention,
    apply_compilation,
    apply_fp8,
    apply_weight_sums,
    importing_kernels,
    may_compile,
)
from foretune.training.loop import Hook
from foretune.training.pace import SavePace
from foretune.training.probes import ISOLATION_TOLERANCE, held_out_loss, isolation_error, write_reference_logits
from foretune.training.saving import CheckpointHook, HeldOut

#: Of the time between two planned saves, what measuring the held-out loss may take; and rows that are kept for it.
_HELD_OUT_SHARE = 0.02
_MOST_HELD_OUT_ROWS = 512


def build_engine(assignment: Assignment, device: torch.device) -> tuple[DeepSpeedEngine, Any]:
    """Engine and model, in the one order that works: configuration, weights, adapters, loss, optimizer, DeepSpeed."""
    compiling = may_compile(assignment, device)
    with importing_kernels(assignment.plan, device):
        engine, model = _build_plain(assignment, device, compiling=compiling)
    apply_weight_sums(assignment, model, engine)
    if compiling:
        apply_compilation(assignment, model)
    # Dropout draws from here on: different on every rank, the same on every start.
    seed_everything(assignment.config.train.seed + assignment.rank.rank)
    return engine, model


def _build_plain(assignment: Assignment, device: torch.device, *, compiling: bool) -> tuple[DeepSpeedEngine, Any]:
    """All but the kernels that are put into a model after DeepSpeed has taken it."""
    config, plan = assignment.config, assignment.plan
    folder = Path(plan.model)
    model_config = loading.load_config(folder, trust_remote_code=config.trust_remote_code)
    changed = loading.override_dropout(model_config, config.train.dropout)
    if changed:
        names = ", ".join(f"{name} {value}" for name, value in changed.items())
        assignment.tell(
            EventKind.NOTE,
            message=f"dropout is {config.train.dropout}, not the model's ({names}); train.dropout: model keeps it",
        )
    with partitioned_loading(plan.deepspeed_config):
        model = loading.load_model(
            folder,
            config=model_config,
            precision=plan.precision,
            from_scratch=config.from_scratch,
            # Evaluation and export draw the base of adapters again, on a CPU: other numbers would be another base.
            draw_on=device if plan.zero_stage < 3 and plan.method == "full" else None,
            trust_remote_code=config.trust_remote_code,
            seed=config.train.seed,
        )
    if plan.method == "lora":
        model = add_adapters(model, config.lora, seed=config.train.seed)
    loading.checkpoint_layers(model, plan.checkpointed_layers)
    apply_attention(assignment, model, device)
    if plan.method == "lora" and plan.zero_stage < 3 and not compiling:
        fuse_adapters(model)
    if plan.fp8:
        apply_fp8(assignment, model, device)
    if plan.mlp_tile_rows and not tile_mlps(model, plan.mlp_tile_rows):
        assignment.tell(
            EventKind.NOTE, message="this model's MLPs cannot be in tiles: they take the memory of whole ones"
        )
    attach_loss(model, chunk_tokens=plan.loss_chunk_tokens, fused=compiling)
    if plan.zero_stage < 3:
        model.to(device)
    optimizer = build_optimizer(
        model.parameters(),
        config.train,
        learning_rate=plan.learning_rate,
        offload_optimizer=0.0 if plan.streams_optimizer else plan.offload_optimizer,
        vectors_apart=plan.vectors_apart,
    )
    engine = DeepSpeedEngine(
        model,
        optimizer,
        plan.deepspeed_config,
        device=device,
        save_frozen=plan.method != "lora",
        streamed_share=plan.offload_optimizer if plan.streams_optimizer else 0.0,
        eight_bits=EightBits(config.train.seed, compiled=compiling) if plan.optimizer_dtype == "8bit" else None,
    )
    return engine, model


def build_loader(assignment: Assignment, engine: Engine) -> Loader:
    """The loader; unpacked where this model does not isolate packed documents (same batches, same mathematics)."""
    plan, rank = assignment.plan, assignment.rank
    open_as = partial(
        open_loader,
        assignment.run.data,
        seed=assignment.config.train.seed,
        global_batch_size=plan.global_batch_size,
        rank=rank.rank,
        world_size=rank.world_size,
        micro_batch_size=plan.micro_batch_size_per_gpu,
    )
    if assignment.packs is not None:
        return open_as(packing=assignment.packs)
    loader = open_as(packing=plan.packing)
    error = isolation_error(engine, loader)
    tolerance = ISOLATION_TOLERANCE[plan.precision]
    isolates = error is None or error <= tolerance
    if not isolates:
        if not plan.packing:
            raise MachineFault(f"the fused loss is {error:.2g} nats a token off the model's own (bound {tolerance:g})")
        lost = f"this model does not keep packed documents apart ({error:.2g} nats a token)"
        assignment.tell(EventKind.NOTE, message=f"{lost}: each gets its own row")
        loader = open_as(packing=False)
    if rank.is_main:  # for launches to come: ranks read it before they join the group, so that all know the same
        write_atomically(assignment.run.packing, "yes" if plan.packing and isolates else "no")
    return loader


def build_pace(assignment: Assignment, *, step: int) -> SavePace | None:
    """What decides when to save, on rank 0; it goes on from `step`."""
    if assignment.journal is None:
        return None
    wanted = assignment.config.checkpoint
    return SavePace(
        assignment.journal,
        step=step,
        every=assignment.plan.checkpoint_every,
        pinned=wanted.every != "auto",
        total_steps=assignment.plan.total_steps,
        max_lost_seconds=60 * wanted.max_lost_minutes,
    )


def build_hooks(
    assignment: Assignment, engine: Engine, model: Any, loader: Loader, *, pace: SavePace | None
) -> list[Hook]:
    """What is called after each step, in this order: journal, accounts, checkpoint."""
    run, plan = assignment.run, assignment.plan

    def write_extras(folder: Path) -> None:
        if plan.method == "lora" and engine.rank == 0:
            save_adapter_config(model, folder)

    checkpoint = CheckpointHook(
        engine,
        run=run,
        plan=plan,
        fingerprint=assignment.prepared.fingerprint,
        config=assignment.config.checkpoint,
        journal=assignment.journal,
        memory=assignment.memory,
        local_rank=assignment.rank.local_rank,
        enter=assignment.enter,
        faults=assignment.faults,
        write_extras=write_extras,
        write_final=lambda folder: write_reference_logits(engine, loader, folder / layout.REFERENCE),
        held_out=_held_out(assignment, engine, loader),
        on_save=lambda step: None if pace is None else pace.saved(step),
    )
    hooks: list[Hook] = [AccountingHook(), checkpoint]
    if assignment.journal is not None:
        hooks.insert(0, JournalHook(assignment.journal, device=engine.device, tensorboard=run.tensorboard))
        if not plan.replanned:
            predicted = plan.predicted.gpu_memory_bytes - plan.predicted.gpu_memory_parts.get("context", 0)
            hooks.append(PeakCheckHook(assignment.journal, device=engine.device, predicted_bytes=predicted))
        if plan.compile_layers:
            hooks.append(CompileHook(assignment.journal))
    return hooks


def _held_out(assignment: Assignment, engine: Engine, loader: Loader) -> HeldOut | None:
    """What measures the held-out loss at each save, where the best checkpoint is to be kept.

    On so many rows that it takes `_HELD_OUT_SHARE` of the time between two planned saves: a forward pass is a third of
    a row's training. All losses of a run are of the same rows: those of its first checkpoint, whatever plan goes on.
    """
    if not assignment.config.checkpoint.keep_best:
        return None
    plan, available = assignment.plan, loader.validation_rows
    rows = math.ceil(3 * _HELD_OUT_SHARE * plan.checkpoint_every * plan.global_batch_size)
    rows = min(available, _MOST_HELD_OUT_ROWS, max(rows, plan.world_size * plan.micro_batch_size_per_gpu))
    rows = store.held_out_rows(assignment.run.checkpoints) or rows
    if rows == 0:
        assignment.tell(EventKind.NOTE, message="the best checkpoint can't be told: no documents were held out")
        return None
    assignment.tell(EventKind.NOTE, message=f"each save measures the loss of {rows} of {available} held-out rows")
    batches = loader.validation(rows)
    return HeldOut(rows, lambda: held_out_loss(engine, batches))
