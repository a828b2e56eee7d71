"""`foretune prove`: plans a short training for each layout, and hands them over to be broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foretune.artifacts import Plan, RunFolder
from foretune.config import Config, parse_config
from foretune.errors import UserError
from foretune.pipeline.folder import expanded
from foretune.pipeline.road import hide_progress_bars, travel

if TYPE_CHECKING:
    from foretune.launch import Agents
    from foretune.proving import Verdict
    from foretune.proving.cells import Layout
    from foretune.proving.verdict import CellResult, SoakVerdict

Matrix = Literal["small", "full"]

#: Restarts are what is proven here: the bound on them must not end it.
_MANY = 1_000_000


def prove(
    config: Config | None = None,
    *,
    out: Path | str = "runs/proof",
    matrix: Matrix = "small",
    only: Sequence[str] = (),
    nproc: int = 2,
    seed: int = 0,
    broken: Sequence[str] = (),
    agents: Agents | None = None,
    on_cell: Callable[[CellResult], None] = lambda result: None,
    on_progress: Callable[[str], None] = lambda message: None,
) -> Verdict:
    """Break a training in every way of the matrix and compare each with one that was left alone.

    Args:
        config: what to train; a tiny model on sums if not given. Its length and its checkpoints are set here.
        only: cells whose name holds one of these words.
        broken: parts of recovery to leave out on purpose: ``random_state``, ``manifest_last``.
        agents: keeps warm processes from one proof to the next; ended by the caller. Its own if not given.
    """
    from foretune import proving

    cells = proving.full_matrix() if matrix == "full" else proving.small_matrix()
    chosen = [cell for cell in cells if not only or any(word in cell.name for word in only)]
    if not chosen:
        raise UserError("--only", ", ".join(only), "names no cell", f"for example --only {cells[0].fault}")
    folder = expanded("--out", out)
    return proving.prove(
        run_maker(config, folder, nproc=nproc, seed=seed, steps=proving.STEPS, every=proving.EVERY),
        chosen,
        out=folder,
        seed=seed,
        broken=broken,
        agents=agents,
        on_cell=on_cell,
        on_progress=on_progress,
    )


def soak(
    config: Config | None = None,
    *,
    out: Path | str = "runs/soak",
    minutes: float = 5.0,
    stage: Literal[0, 1, 2, 3] = 2,
    nproc: int = 2,
    seed: int = 0,
    steps: int = 280,
    agents: Agents | None = None,
    on_progress: Callable[[str], None] = lambda message: None,
) -> SoakVerdict:
    """Kill random ranks at random times for some minutes, and compare every training that ends meanwhile.

    Args:
        steps: of each training.
        agents: as for `prove`.
    """
    from foretune import proving
    from foretune.proving.cells import Layout

    folder = expanded("--out", out)
    maker = run_maker(config, folder, nproc=nproc, seed=seed, steps=steps, every=2 * proving.EVERY)
    return proving.soak(
        maker,
        out=folder,
        layout=Layout(stage),
        minutes=minutes,
        seed=seed,
        agents=agents,
        on_progress=on_progress,
    )


def run_maker(
    config: Config | None, folder: Path, *, nproc: int, seed: int, steps: int, every: int
) -> Callable[[Layout, Path], tuple[RunFolder, Plan, Config]]:
    """Makes the planned run of a layout: of `config`, or of a tiny model on sums."""
    from foretune.proving.subject import write_subject

    hide_progress_bars()
    if config is None:
        model, data = write_subject(folder / "subject")
        values: dict[str, Any] = {"model": str(model), "data": {"sources": [{"path": str(data)}], "num_proc": 1}}
        values["train"] = {
            "learning_rate": 1e-2,
            "max_length": 64,
            "global_batch_size": 16,
            "dropout": "model",
        }
        values["plan"] = {"micro_batch_size_per_gpu": 4}
    else:
        values = config.model_dump(mode="json", exclude_defaults=True)
    values.setdefault("train", {})
    values["train"] |= {"max_steps": steps, "seed": values["train"].get("seed", seed), "deterministic": True}
    values["checkpoint"] = {"every": every, "keep": 3}
    values["recover"] = {"restarts_per_hour": _MANY, "hang_seconds": 4.0, "loss_spike": 3.0}

    def make(layout: Layout, out: Path) -> tuple[RunFolder, Plan, Config]:
        plan = {**values.get("plan", {}), "zero_stage": layout.stage, "offload_optimizer": layout.offload}
        train = values["train"] if layout.dropout else {**values["train"], "dropout": 0.0}
        changes: dict[str, Any] = {"method": "lora" if layout.lora else "full"}
        if layout.eight_bits:
            plan, train = plan | {"optimizer_dtype": "8bit"}, train | {"precision": "bf16"}
            changes["allow_numerics"] = True
        wanted = parse_config({**values, "plan": plan, "train": train, **changes})
        run = RunFolder(out)
        result = travel(wanted, out=out, nproc=layout.ranks or nproc, until="plan")
        assert result.plan is not None
        return run, result.plan, wanted

    return make
