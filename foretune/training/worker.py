"""A rank's main: builds everything in order, then calls the loop.

    python -m foretune.training.worker --run RUN

    plan, config, data ─▶ process group ─▶ model ─▶ adapters ─▶ loss ─▶ engine ─▶ resume ─▶ loop ─▶ outcome file

It decides nothing: what is to be done stands in RUN/config.yaml and RUN/plan.json. It reports by writing
RUN/launch/outcome-00000.json and exits 0 when it did what it was asked (finished, or stopped as asked); any other exit
makes torchrun's agent end the other ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from foretune.artifacts import Outcome, Plan, PreparedDataset, RunFolder
from foretune.config import Config, load_config
from foretune.distributed import RankInfo, die_with_parent, rank_info
from foretune.errors import MachineFault, UserError
from foretune.events import EventKind, Journal
from foretune.logger import configure, get_logger

logger = get_logger(__name__)


def main() -> int:
    """Run one rank to its end; returns the exit code."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="foretune.training.worker")
    parser.add_argument("--run", type=Path, required=True)
    run = RunFolder(parser.parse_args().run)
    rank = rank_info()
    _write_log_to(run.log_of(rank.rank))
    configure(prefix=f"[rank {rank.rank}] ")
    try:
        outcome = _train(run, rank)
    except UserError as error:
        outcome = Outcome.of_user_error(error)
    except MachineFault as error:
        traceback.print_exc()
        outcome = Outcome(status="machine_fault", cause=error.cause, step=error.step)
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(status="bug", cause=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
    outcome.write(run.outcome_of(rank.rank))
    return 0 if outcome.status in ("done", "preempted") else 1


def _train(run: RunFolder, rank: RankInfo) -> Outcome:
    # Imported here: a rank that only fails to parse its arguments should not wait for torch.
    from foretune.engine import close_group, open_group
    from foretune.training.loop import Hook, train
    from foretune.training.schedule import learning_rate

    config = load_config(run.config)
    plan = Plan.read(run.plan)
    prepared = PreparedDataset.read(run.data / PreparedDataset.file_name)
    journal = Journal(run.events) if rank.is_main else None
    _set_determinism(config)
    device = open_group(rank)
    engine, model = _build_engine(config, plan, device, journal)
    loader = _open_loader(run, config, plan, rank, engine, journal)
    state, resumed_from = _resume(run, plan, prepared, engine, rank, journal)
    checkpoint_hook = _checkpoint_hook(run, config, plan, prepared, engine, model, loader, journal)
    hooks: list[Hook] = [_accounting(), checkpoint_hook]
    journal_hook = _journal_hook(run, journal, device)
    if journal_hook is not None:
        hooks.insert(0, journal_hook)
    if journal is not None:
        journal.write(
            EventKind.TRAINING_STARTED,
            step=state.step,
            total_steps=plan.total_steps,
            world_size=rank.world_size,
            resumed_from=resumed_from,
        )
    start = time.perf_counter()
    finished = train(
        engine,
        loader,
        state,
        total_steps=plan.total_steps,
        learning_rate=partial(
            learning_rate,
            peak=plan.learning_rate,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
            schedule=plan.schedule,
        ),
        hooks=hooks,
        stop_requested=lambda: rank.is_main and run.stop_request.exists(),
        skips_overflow=plan.precision == "fp16",
    )
    if journal_hook is not None:
        journal_hook.close()
    if journal is not None:
        _write_ending(journal, state, finished=finished, seconds=time.perf_counter() - start)
    engine.barrier()
    close_group()
    return Outcome(status="done" if finished else "preempted", step=state.step)


def _build_engine(config: Config, plan: Plan, device: Any, journal: Journal | None) -> tuple[Any, Any]:
    """Model and engine, in the one order that works: configuration, weights, adapters, loss, optimizer, DeepSpeed."""
    from foretune.engine import DeepSpeedEngine, build_optimizer, partitioned_loading
    from foretune.model import loading
    from foretune.model.adapters import add_adapters
    from foretune.model.loss import attach_loss

    folder = Path(plan.model)
    model_config = loading.load_config(folder, trust_remote_code=config.trust_remote_code)
    changed = loading.override_dropout(model_config, config.train.dropout)
    if changed and journal is not None:
        names = ", ".join(f"{name} {value}" for name, value in changed.items())
        journal.write(
            EventKind.NOTE, message=f"dropout is {config.train.dropout} instead of the model's ({names}); train.dropout: model keeps it"
        )
    with partitioned_loading(plan.deepspeed_config):
        model = loading.load_model(
            folder,
            config=model_config,
            precision=plan.precision,
            from_scratch=config.from_scratch,
            trust_remote_code=config.trust_remote_code,
            seed=config.train.seed,
        )
    if plan.method == "lora":
        model = add_adapters(model, config.lora, seed=config.train.seed)
    loading.checkpoint_layers(model, plan.checkpointed_layers)
    attach_loss(model, chunk_tokens=plan.loss_chunk_tokens)
    if plan.zero_stage < 3:
        model.to(device)
    optimizer = build_optimizer(model.parameters(), config.train, learning_rate=plan.learning_rate)
    engine = DeepSpeedEngine(
        model, optimizer, plan.deepspeed_config, device=device, save_frozen=plan.method != "lora"
    )
    return engine, model


def _open_loader(
    run: RunFolder, config: Config, plan: Plan, rank: RankInfo, engine: Any, journal: Journal | None
) -> Any:
    """The loader; unpacked where this model does not isolate packed documents (same batches, same mathematics)."""
    from foretune.data import open_loader
    from foretune.training.probes import ISOLATION_TOLERANCE, isolation_error

    open_as = partial(
        open_loader,
        run.data,
        seed=config.train.seed,
        global_batch_size=plan.global_batch_size,
        rank=rank.rank,
        world_size=rank.world_size,
        micro_batch_size=plan.micro_batch_size_per_gpu,
    )
    loader = open_as(packing=plan.packing)
    error = isolation_error(engine, loader)
    tolerance = ISOLATION_TOLERANCE[plan.precision]
    if error is None or error <= tolerance:
        return loader
    if not plan.packing:
        raise MachineFault(f"the fused loss differs from the model's own by {error:.2g} nats a token (bound {tolerance:g})")
    if journal is not None:
        journal.write(
            EventKind.NOTE,
            message=f"this model does not keep packed documents apart ({error:.2g} nats a token): each gets a row of its own",
        )
    return open_as(packing=False)


def _resume(
    run: RunFolder, plan: Plan, prepared: PreparedDataset, engine: Any, rank: RankInfo, journal: Journal | None
) -> tuple[Any, str | None]:
    """The state to go on from, and the checkpoint it came from."""
    import torch

    from foretune.checkpoint import layout, store
    from foretune.checkpoint.snapshot import load_random_state
    from foretune.training.state import TrainState

    state = TrainState()
    chosen: list[str | None] = [None]
    if rank.is_main:  # one rank verifies and chooses, so that all load the same
        say = partial(journal.write, EventKind.NOTE) if journal is not None else None
        found = store.newest_complete(
            run.checkpoints, on_passed_over=(lambda message: say(message=message)) if say else None
        )
        chosen = [str(found[0]) if found else None]
    if rank.world_size > 1:
        torch.distributed.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        return state, None
    folder = Path(chosen[0])
    manifest = store.Checkpoint.read(folder / layout.MANIFEST)
    _check_same_run(manifest, plan, prepared, rank)
    engine.load(folder)
    load_random_state(folder / layout.rank_file(rank.rank))
    state.load_state_dict(manifest.train_state)
    return state, folder.name


def _check_same_run(manifest: Any, plan: Plan, prepared: PreparedDataset, rank: RankInfo) -> None:
    """A checkpoint continues the run it came from and no other."""
    if manifest.fingerprint != prepared.fingerprint:
        raise UserError(
            "data", prepared.fingerprint[:12], "the checkpoints were made from other data", "give another --out, or delete the checkpoints"
        )
    if manifest.world_size != rank.world_size:
        raise UserError(
            "--nproc",
            rank.world_size,
            f"the checkpoints were made by {manifest.world_size} ranks",
            f"run again with --nproc {manifest.world_size}",
        )
    for field in ("zero_stage", "precision", "method"):
        if getattr(manifest, field) != getattr(plan, field):
            raise UserError(
                f"plan.{field}" if field == "zero_stage" else field,
                getattr(plan, field),
                f"the checkpoints were made with {getattr(manifest, field)}",
                f"set it to {getattr(manifest, field)}, or give another --out",
            )


def _checkpoint_hook(
    run: RunFolder,
    config: Config,
    plan: Plan,
    prepared: PreparedDataset,
    engine: Any,
    model: Any,
    loader: Any,
    journal: Journal | None,
) -> Any:
    from foretune.checkpoint import layout
    from foretune.model.adapters import save_adapter_config
    from foretune.training.hooks import CheckpointHook
    from foretune.training.probes import write_reference_logits

    def write_extras(folder: Path) -> None:
        if plan.method == "lora" and engine.rank == 0:
            save_adapter_config(model, folder)

    return CheckpointHook(
        engine,
        checkpoints=run.checkpoints,
        plan=plan,
        fingerprint=prepared.fingerprint,
        keep=config.checkpoint.keep,
        journal=journal,
        write_extras=write_extras,
        write_final=lambda folder: write_reference_logits(engine, loader, folder / layout.REFERENCE),
    )


def _accounting() -> Any:
    from foretune.training.hooks import AccountingHook

    return AccountingHook()


def _journal_hook(run: RunFolder, journal: Journal | None, device: Any) -> Any:
    from foretune.training.hooks import JournalHook

    return JournalHook(journal, device=device, tensorboard=run.tensorboard) if journal is not None else None


def _write_ending(journal: Journal, state: Any, *, finished: bool, seconds: float) -> None:
    phases = {phase: round(value, 3) for phase, value in (state.seconds_by_phase or {}).items()}
    phases["other"] = round(max(0.0, state.seconds - sum(v for p, v in phases.items() if p != "checkpoint")), 3)
    journal.write(EventKind.BREAKDOWN, seconds_by_phase=phases)
    journal.write(
        EventKind.TRAINING_FINISHED, step=state.step, finished=finished, seconds=round(seconds, 3), breakdown=phases
    )


def _set_determinism(config: Config) -> None:
    import torch

    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)


def _write_log_to(path: Path) -> None:
    """Send everything this process prints, C libraries included, to a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter shutdown with a process group's threads can crash or hang; everything is written by now.
    os._exit(code)
