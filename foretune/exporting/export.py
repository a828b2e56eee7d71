"""From a checkpoint to Hugging Face folders that are proven to say what training said.

    RUN/checkpoints/step-… ──hashes──▶ choose ──weights, config, tokenizer, generation, card──▶ .TO.PID.partial/
        ──read back, load with plain transformers, 8 rows of logits──▶ foretune.json ──rename──▶ TO/

    full fine-tuning:  TO/ is the model           LoRA:  TO/adapter/ and TO/merged/

Whatever fails, nothing appears at TO and what stood there stays. Host memory: one shard while writing; the model once,
in the trained precision, while verifying (and while merging).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from foretune.artifacts import (
    Checkpoint,
    EvaluationReport,
    ExportedModel,
    Plan,
    PreparedDataset,
    RunFolder,
    sync_folder,
)
from foretune.checkpoint import layout, store
from foretune.checkpoint.consolidate import iterate_weights, load_weights
from foretune.config import Config, load_config
from foretune.errors import UserError
from foretune.exporting import companions, lora
from foretune.exporting.card import base_name, model_card
from foretune.exporting.verification import LogitCheck, check_logits, check_tokenizer, load_and_check
from foretune.exporting.weights import WrittenWeights, check_weights, write_weights
from foretune.model import loading
from foretune.model.adapters import restore_adapters

Kind = Literal["full", "merged", "adapter"]
_KINDS: dict[str, tuple[Kind, ...]] = {"full": ("full",), "lora": ("adapter", "merged")}


@dataclass(frozen=True)
class _Source:
    """What is exported."""

    run: RunFolder
    config: Config
    plan: Plan
    prepared: PreparedDataset
    checkpoint: Path
    manifest: Checkpoint

    @property
    def base(self) -> Path:
        return Path(self.plan.model)

    @property
    def dtype(self) -> torch.dtype:
        return loading.DTYPES[self.plan.precision]

    @property
    def reference(self) -> Path:
        return self.checkpoint / layout.REFERENCE

    @property
    def tokenizer(self) -> Path:
        return self.run.data / "tokenizer"

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iterate_weights(self.checkpoint, verified=self.manifest)


def export_run(
    run: RunFolder,
    *,
    to: Path | None = None,
    step: int | None = None,
    kinds: Sequence[str] = ("auto",),
    on_progress: Callable[[str], None] = lambda message: None,
) -> list[ExportedModel]:
    """Export a run's checkpoint as verified Hugging Face folders.

    Args:
        run: a run that has trained.
        to: target folder, made by this; RUN/export if None. An earlier export there is replaced.
        step: which checkpoint; the newest complete one if None.
        kinds: ``auto`` (full: the model; LoRA: adapter and merged), or of ``full``, ``adapter``, ``merged``.
        on_progress: called with what is being done.

    Returns:
        One manifest per folder: `to` itself for a full model, ``to/adapter`` and ``to/merged`` for LoRA.

    Raises:
        UserError: no such checkpoint, one without reference logits, an occupied target, no space.
        VerificationFailed: a check failed; the message names it and its figures. `to` is as it was before.
    """
    target = (to or run.export).absolute()
    source = _source(run, step)
    chosen = _kinds(source, kinds)
    _refuse_occupied(target)
    _refuse_small_disk(source, target, chosen)
    with _partial_folder(target) as partial, _quiet_libraries():
        exported = []
        for kind in chosen:
            folder = partial if kind == "full" else partial / kind
            folder.mkdir(exist_ok=True)
            on_progress(f"writing and verifying {kind}")
            exported.append(_export_one(source, kind, folder))
        _put_in_place(partial, target)
    return exported


def _source(run: RunFolder, step: int | None) -> _Source:
    """Read the run and choose the checkpoint; its hashes match."""
    plan, config = Plan.read(run.plan), load_config(run.config)
    prepared = PreparedDataset.read(run.data / PreparedDataset.file_name)
    checkpoint, manifest = store.choose(run.checkpoints, step)
    if not (checkpoint / layout.REFERENCE).is_file():
        raise UserError(
            "RUN",
            str(run.path),
            f"training has not ended: checkpoint {checkpoint.name} holds no logits for an export to be verified with",
            "start the same command again and let it end, or stop it once with Ctrl-C",
        )
    return _Source(run, config, plan, prepared, checkpoint, manifest)


def _kinds(source: _Source, wanted: Sequence[str]) -> tuple[Kind, ...]:
    possible = _KINDS[source.plan.method]
    if tuple(wanted) == ("auto",):
        # Random base weights are nowhere to be loaded from: an adapter for them would be of no use to anyone.
        return ("merged",) if source.plan.method == "lora" and source.config.from_scratch else possible
    unknown = [kind for kind in wanted if kind not in possible]
    if unknown or not wanted:
        problem = f"is nothing that a {source.plan.method} run can be exported as"
        raise UserError("--kind", ", ".join(wanted), problem, f"choose of {', '.join(possible)}")
    return tuple(kind for kind in possible if kind in wanted)


def _export_one(source: _Source, kind: Kind, folder: Path) -> ExportedModel:
    """Write one folder whole, verify it, and write its manifest last."""
    companions.copy_tokenizer(source.tokenizer, folder)
    if kind == "adapter":
        written, check, eos = _write_adapter(source, folder)
    else:
        written, check, eos = _write_model(source, kind, folder)
    model_config = loading.load_config(source.base, trust_remote_code=source.config.trust_remote_code)
    rows = model_config.get_text_config().vocab_size
    template = check_tokenizer(
        folder, source.tokenizer, embedding_rows=rows, trust_remote_code=source.config.trust_remote_code
    )
    _write_card(source, kind, folder, check)
    manifest = ExportedModel(
        kind=kind,
        step=source.manifest.step,
        parameters=written.parameters,
        dtype=str(source.dtype).removeprefix("torch."),
        max_logit_difference=check.max_difference,
        logit_tolerance=check.tolerance,
        mean_divergence=check.divergence,
        divergence_tolerance=check.divergence_tolerance,
        eos_token_ids=eos,
        chat_template_sha256=template,
        files=store.hash_files(folder),  # synced to disk on the way
    )
    manifest.write(folder / ExportedModel.file_name)
    return manifest


def _write_model(source: _Source, kind: Kind, folder: Path) -> tuple[WrittenWeights, LogitCheck, list[int]]:
    trust = source.config.trust_remote_code
    skeleton = _skeleton(source)
    if kind == "full":
        tensors = source.weights()
    else:
        adapted = restore_adapters(_base_model(source), source.checkpoint)
        load_weights(adapted, source.checkpoint, verified=source.manifest)
        tensors = lora.model_tensors(lora.merged_model(adapted))
    written = write_weights(_as_published(skeleton, tensors), folder, dtype=source.dtype)
    config = loading.load_config(source.base, trust_remote_code=trust)
    companions.write_config(config, folder, architecture=type(skeleton).__name__, dtype=source.dtype, base=source.base)
    eos = companions.write_generation_config(
        folder, base=source.base, prepared=source.prepared, trust_remote_code=source.config.trust_remote_code
    )
    del tensors  # a merged model goes before the next copy comes
    check_weights(folder, written)
    model = load_and_check(folder, dtype=source.dtype, trust_remote_code=trust)
    return written, check_logits(model, source.reference, precision=source.plan.precision), eos


def _write_adapter(source: _Source, folder: Path) -> tuple[WrittenWeights, LogitCheck, list[int]]:
    base = source.config.model if base_name(source.config) == source.config.model else str(source.base)
    written = lora.write_adapter(source.weights(), folder, checkpoint=source.checkpoint, base=base)
    eos = companions.write_generation_config(
        folder, base=source.base, prepared=source.prepared, trust_remote_code=source.config.trust_remote_code
    )
    check_weights(folder, written)
    model = lora.load_adapter(_base_model(source), folder, written)
    return written, check_logits(model, source.reference, precision=source.plan.precision), eos


def _base_model(source: _Source) -> Any:
    return loading.load_model(
        source.base,
        precision=source.plan.precision,
        from_scratch=source.config.from_scratch,
        trust_remote_code=source.config.trust_remote_code,
        seed=source.config.train.seed,
    )


def _skeleton(source: _Source) -> Any:
    """The model without memory: for its class, and for how transformers names its weights on disk."""
    from transformers import AutoModelForCausalLM

    trust = source.config.trust_remote_code
    config = loading.load_config(source.base, trust_remote_code=trust)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def _as_published(skeleton: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and cuts of weights as published models have them; transformers joins experts, for one, when it loads."""
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in tensors:
        yield from revert_weight_conversion(skeleton, {name: tensor}).items()


def _write_card(source: _Source, kind: Kind, folder: Path, check: LogitCheck) -> None:
    evaluation = None
    if source.run.evaluation.is_file():
        report = EvaluationReport.read(source.run.evaluation)
        evaluation = report if report.step == source.manifest.step else None
    verified = (
        "Before it ended, training wrote the logits of fixed rows of its data. Loaded with plain transformers, this "
        f"folder reproduces them: largest difference {check.max_difference:.2g} (tolerance {check.tolerance:.2g}), "
        f"mean KL divergence {check.divergence:.2g} nats (tolerance {check.divergence_tolerance:.2g}). Every file's "
        f"sha256 is in `{ExportedModel.file_name}`."
    )
    name = f"{base_name(source.config).rpartition('/')[2].removesuffix('.gguf')}, fine-tuned"
    card = model_card(
        source.config,
        source.plan,
        source.prepared,
        kind=kind,
        name=name,
        step=source.manifest.step,
        verified=verified,
        evaluation=evaluation,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _refuse_occupied(target: Path) -> None:
    """Only an earlier export is ever replaced."""
    if not target.exists() or (target.is_dir() and (_is_export(target) or not any(target.iterdir()))):
        return
    what = "is not empty and no export of ours" if target.is_dir() else "is a file"
    raise UserError("--to", str(target), what, "name a folder that does not exist yet")


def _is_export(folder: Path) -> bool:
    return any(
        path.is_file() for path in (folder / ExportedModel.file_name, *folder.glob(f"*/{ExportedModel.file_name}"))
    )


def _refuse_small_disk(source: _Source, target: Path, kinds: Sequence[Kind]) -> None:
    models = sum(kind != "adapter" for kind in kinds)
    needed = source.plan.parameters * source.dtype.itemsize * models + source.plan.trainable_parameters * 4
    parent = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        problem = f"its disk has {free / 1e9:.1f} GB free, the export needs {needed / 1e9:.1f} GB"
        raise UserError("--to", str(target), problem, "free some, or give a --to on another disk")


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A sibling of the target to write into, gone afterwards; those of processes that are no more go too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if not Path(f"/proc/{left.name.split('.')[-2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename; an earlier export steps aside first and is deleted last."""
    for folder in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
        sync_folder(folder)
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No progress bars of transformers inside ours."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
