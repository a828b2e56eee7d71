"""The verbs as functions: what ``import foretune`` offers, and what the command line calls.

    foretune.run(model="gpt2", data="examples.jsonl", method="lora", train={"epochs": 2})

Keys of the configuration are keyword arguments; a section is a mapping. All raise `foretune.errors.ForetuneError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foretune import planning
from foretune.artifacts import EvaluationReport, ExportedModel, Plan, PreparedDataset, RunFolder
from foretune.checkpoint import layout, store
from foretune.config import Config, load_config
from foretune.errors import UserError
from foretune.model.source import default_cache, resolve_model
from foretune.pipeline.estimate import estimate_data
from foretune.pipeline.first_look import look_at_model
from foretune.pipeline.folder import calibration_file, default_out, expanded, in_use, resolved
from foretune.pipeline.road import EventSink, RunResult, exported_models, hide_progress_bars, travel
from foretune.planning.shapes import known_shape

_PathLike = str | Path

#: Stands for the data in a plan that is asked for a model alone.
NO_DATA = "no-data-given"


def run(
    model: str | None = None,
    data: Any = None,
    *,
    config: _PathLike | None = None,
    out: _PathLike | None = None,
    nproc: int | None = None,
    on_event: EventSink = lambda event: None,
    **keys: Any,
) -> RunResult:
    """Go the whole road: prepare, plan, train, evaluate, export. Calling it again goes on where it ended.

    Args:
        model: hub id, folder or .gguf file.
        data: file, folder, glob, hub data set, or a list of such or of ``{path, weight, format}``.
        config: YAML file; the other arguments win over it.
        out: run folder; derived from the configuration if not given.
        nproc: ranks; one per GPU if not given.
        on_event: called with every event of the journal.
        keys: any other key of the configuration; a section is a mapping.
    """
    wanted = _config(config, model=model, data=data, keys=keys)
    return travel(wanted, out=_path(out), nproc=nproc, on_event=on_event)


def train(
    model: str | None = None,
    data: Any = None,
    *,
    config: _PathLike | None = None,
    out: _PathLike | None = None,
    nproc: int | None = None,
    on_event: EventSink = lambda event: None,
    **keys: Any,
) -> RunResult:
    """As `run`, ending with the last checkpoint."""
    wanted = _config(config, model=model, data=data, keys=keys)
    return travel(wanted, out=_path(out), nproc=nproc, until="train", on_event=on_event)


def prepare(
    model: str | None = None,
    data: Any = None,
    *,
    config: _PathLike | None = None,
    out: _PathLike | None = None,
    on_event: EventSink = lambda event: None,
    **keys: Any,
) -> PreparedDataset:
    """Clean, template, tokenise and pack the data into ``out/data``; says what was kept and what was dropped."""
    wanted = _config(config, model=model, data=data, keys=keys)
    return travel(wanted, out=_path(out), until="prepare", on_event=on_event).prepared


def plan(
    model: str | None = None,
    data: Any = None,
    *,
    config: _PathLike | None = None,
    hardware: str = "auto",
    nproc: int | None = None,
    out: _PathLike | None = None,
    tokens: int | None = None,
    **keys: Any,
) -> Plan:
    """Decide how to train, with a reason for every choice; nothing runs and nothing is written.

    Args:
        hardware: ``auto`` looks at this machine; or for example ``8xH100-80GB``, ``2x8xA100-40GB``, ``4xcpu``.
        out: a run folder whose prepared data the plan is made for, where there is some.
        tokens: of one pass over the data, where it is not prepared yet.
    """
    wanted = _config(config, model=model, data=NO_DATA if data is None and config is None else data, keys=keys)
    return plan_for(wanted, hardware=hardware, nproc=nproc, out=_path(out), tokens=tokens)


def plan_for(
    config: Config,
    *,
    hardware: str = "auto",
    nproc: int | None = None,
    out: Path | None = None,
    tokens: int | None = None,
    calibration: Path | None = None,
) -> Plan:
    """As `plan`, for a `Config`. `calibration`: what runs on this machine took; `calibration_file` if not given."""
    if not hardware.startswith("auto") and nproc is not None:
        raise UserError("--nproc", nproc, "can't be given together with --hardware", "write the ranks into --hardware")
    cluster = planning.parse_hardware(hardware, nproc)
    config = resolved(config)
    folder = RunFolder(out or default_out(config))
    manifest = folder.data / PreparedDataset.file_name
    prepared = PreparedDataset.read(manifest) if manifest.is_file() and tokens is None else None
    model = _described_model(config)
    estimate = estimate_data(config, model) if prepared is None and tokens is None else None
    return planning.make_plan(
        config,
        model_folder=model,
        cluster=cluster,
        prepared=prepared,
        tokens=tokens,
        estimate=estimate,
        calibration=planning.Calibration(calibration or calibration_file()),
        vectors_apart=store.vectors_apart(folder.checkpoints),
    )


def plan_for_deepspeed_alone(made: Plan, config: Config, **given: Any) -> Plan:
    """The plan whose DeepSpeed file says all there is: `made`, or the best whose optimizer is not streamed.

    Args:
        given: as for `plan_for`.

    Raises:
        UserError, NoPlanFits: there is no such plan.
    """
    if not made.streams_optimizer:
        return made
    pins = config.plan.model_copy(update={"offload_optimizer_step": "host"})
    return plan_for(config.model_copy(update={"plan": pins}), **given)


def confirm(made: Plan, config: Config) -> dict[str, Any]:
    """Build the plan's engine on fake tensors: what it holds against what was predicted (`foretune.dryrun.DryRun`)."""
    from foretune.dryrun import dry_run

    return dry_run(made, resolved(config)).as_json()


def evaluate(
    what: _PathLike,
    data: str | None = None,
    *,
    tasks: Sequence[str] = (),
    step: int | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[str], None] = lambda message: None,
) -> EvaluationReport:
    """Loss and perplexity: of a run, base against tuned, on its held-out documents or `data`; of a model, on `data`.

    `step`: of a run's checkpoint; the newest if not given.
    """
    path = expanded("RUN", what)
    data = data if data is None else str(expanded("--data", data))
    if RunFolder.is_run(path):
        folder = RunFolder(path)
        _require_checkpoint(folder)
        from foretune.evaluation import evaluate_run

        hide_progress_bars()
        config = load_config(folder.config)
        tasks = list(tasks) or config.evaluate.tasks
        return evaluate_run(folder, config, data=data, tasks=tasks, step=step, on_progress=on_progress)
    if step is not None:
        raise UserError(
            "--step", step, "names a checkpoint, and a model has none", "leave it out, or give a run folder"
        )
    if data is None:
        raise UserError("--data", None, "is required to evaluate a model", "give a file of examples: --data FILE")
    model = _model_folder(str(what), trust_remote_code=trust_remote_code)
    look_at_model(model, trust_remote_code=trust_remote_code)
    from foretune.evaluation import evaluate_model

    hide_progress_bars()
    return evaluate_model(model, data=data, tasks=tasks, trust_remote_code=trust_remote_code, on_progress=on_progress)


def export(
    what: _PathLike,
    to: _PathLike | None = None,
    *,
    kinds: Sequence[str] = ("auto",),
    step: int | None = None,
    on_progress: Callable[[str], None] = lambda message: None,
) -> list[ExportedModel]:
    """Write a run's checkpoint as verified Hugging Face folders.

    Args:
        to: the folder; ``RUN/export`` if not given. Adapters get folders of their own in it: ``adapter``, ``merged``.
        kinds: of ``full``, ``adapter``, ``merged``; ``auto`` is every kind that the method has.
        step: of the checkpoint; the newest if not given.
    """
    path = expanded("RUN", what)
    if not RunFolder.is_run(path):
        raise UserError(
            "RUN", str(what), "is no run folder (it has no config.yaml)", "give the --out of a `foretune run`"
        )
    folder = RunFolder(path)
    _require_checkpoint(folder)
    from foretune.exporting import export_run

    return export_run(folder, to=_path(to, "--to") or folder.export, kinds=kinds, step=step, on_progress=on_progress)


def report(what: _PathLike, *, out: _PathLike | None = None) -> Path:
    """Write one self-contained HTML file about a run, at whatever stage it is, or about a folder of `prove`.

    Args:
        out: the file; ``RUN/report.html`` if not given.
    """
    from foretune.reporting.page import write_report

    folder = expanded("RUN", what)
    return write_report(folder, out=_path(out), in_use=in_use(folder))


def serve(
    what: _PathLike, *, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None, engine: str = "auto"
) -> None:
    """Serve a run's export or a model folder over OpenAI-style HTTP; returns when it is stopped."""
    from foretune.serving import serve as serve_folder

    serve_folder(served_folder(what), host=host, port=port, api_key=api_key, engine=engine)


def chat(
    what: _PathLike,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
) -> None:
    """Talk to a run's export or a model folder in the terminal; with `prompt`, answer that alone."""
    from foretune.serving import chat as chat_with

    chat_with(served_folder(what), prompt=prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature)


def served_folder(what: _PathLike) -> Path:
    """The folder that is served for a run (its export; merged, where there is an adapter too) or for a model."""
    path = expanded("RUN", what)
    if not RunFolder.is_run(path):
        return _model_folder(str(what))
    exports = RunFolder(path).export
    if not exported_models(exports):
        raise UserError("RUN", str(what), "has no export yet", f"run `foretune export {what}` first")
    for folder in (exports, exports / "merged"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError("RUN", str(what), "has only an adapter exported", f"export it merged: `foretune export {what}`")


def _config(path: _PathLike | None, *, model: str | None, data: Any, keys: dict[str, Any]) -> Config:
    flags = {"model": model, "data": str(data) if isinstance(data, Path) else data, **keys}
    return load_config(
        _path(path), flags={key: value for name, item in flags.items() for key, value in _dotted(name, item)}
    )


def _dotted(name: str, value: Any) -> list[tuple[str, Any]]:
    """``train={"epochs": 2}`` as dotted keys, so that a section adds to the file's instead of replacing it."""
    if name == "data" or not isinstance(value, dict):
        return [(name, str(value) if isinstance(value, Path) else value)]
    return [(f"{name}.{key}", item) for key, item in value.items()]


def _path(value: _PathLike | None, field: str = "--out") -> Path | None:
    return None if value is None else expanded(field, value)


def _described_model(config: Config) -> Path | str:
    """What a plan needs of a model: its config.json, or only its name where that is a well-known one and not here."""
    if not os.path.exists(config.model) and known_shape(config.model) is not None:
        return config.model
    return _model_folder(config.model, weights=False, trust_remote_code=config.trust_remote_code)


def _model_folder(name: str, *, weights: bool = True, trust_remote_code: bool = False) -> Path:
    """The folder of a model that belongs to no run."""
    return resolve_model(
        name,
        run_model_folder=default_cache() / "by-name" / Path(name).stem,
        weights=weights,
        trust_remote_code=trust_remote_code,
    )


def _require_checkpoint(folder: RunFolder) -> None:
    if not layout.complete_steps(folder.checkpoints):
        raise UserError(
            "RUN",
            str(folder.path),
            "has no checkpoint",
            f"train it first: foretune train {folder.config} --out {folder.path}",
        )
