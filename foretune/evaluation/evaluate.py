"""The stage: base against tuned on the same tokens.

    documents ─┬─▶ base weights ──score, answer──┐
               └─▶ the checkpoint's weights, put into the same model ──score, answer──┴─▶ bootstrap ─▶ EvaluationReport

in: a run's newest complete checkpoint, or any model folder   out: RUN/evaluation.json

One model in memory at a time, in the trained precision. No export is needed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foretune.artifacts import (
    EvaluationReport,
    GenerationSample,
    LossEstimate,
    Plan,
    PreparedDataset,
    RunFolder,
)
from foretune.checkpoint import store
from foretune.checkpoint.consolidate import load_weights
from foretune.config import Config, DataConfig, DataSource, parse_config
from foretune.data import load_tokenizer
from foretune.data.chat_template import stop_token_ids
from foretune.data.prepare import prepare
from foretune.errors import UserError
from foretune.evaluation.bootstrap import interval, resampled_means
from foretune.evaluation.documents import Document, Documents, folder_for, held_out, whole_folder
from foretune.evaluation.tasks import check_documents, check_tasks, score_answers
from foretune.model import loading
from foretune.model.adapters import restore_adapters
from foretune.model.generate import continue_tokens
from foretune.model.scoring import DocumentScores, fitting_device, score_documents
from foretune.model.shape import read_shape

Say = Callable[[str], None]

#: Tokens scored per model unless told otherwise. A core scores 190 tokens/s with 135M parameters in float32 (measured).
MAX_TOKENS = {"cpu": 8_192, "cuda": 524_288}
#: Documents answered for the tasks, and tokens per answer.
_TASK_DOCUMENTS = {"cpu": 32, "cuda": 512}
_LONGEST_TASK_ANSWER = 512
_NUM_SAMPLES = 4
_SAMPLE_TOKENS = {"cpu": 48, "cuda": 128}
_LONGEST_SAMPLE_PROMPT = 512
_FEW_DOCUMENTS = 20
_BATCH = {"cpu": 4, "cuda": 32}


@dataclass(frozen=True)
class _Work:
    """What every model is asked, decided before the first is loaded."""

    data: Documents
    tokenizer: Any
    tasks: Sequence[str]
    kind: str  # of device: "cpu" or "cuda"
    samples: list[Document]
    sample_tokens: int  # longest answer to a sample
    answered: list[Document]
    references: list[str]
    task_tokens: int  # longest answer to a task


@dataclass(frozen=True)
class _Result:
    """What one model gave."""

    scores: DocumentScores
    samples: list[str]
    answers: list[str]


def evaluate_run(
    run: RunFolder,
    config: Config,
    *,
    data: str | None = None,
    tasks: Sequence[str] = (),
    max_tokens: int | None = None,
    step: int | None = None,
    on_progress: Say = lambda message: None,
) -> EvaluationReport:
    """Evaluate a run's newest complete checkpoint, or that of a step, against the model it started from.

    Args:
        run: a run that has trained.
        config: its configuration.
        data: a file of examples; the held-out documents if None. Prepared with the run's tokenizer and template.
        tasks: names of `foretune.evaluation.TASKS`.
        max_tokens: bound on the tokens that are scored; `MAX_TOKENS` if None. The report says when it cut.
        on_progress: called with what is being done.

    Returns:
        The report; also written to RUN/evaluation.json, or for other data beside their prepared form below
        RUN/evaluation/.

    Raises:
        UserError: nothing was held out, no checkpoint (of that step), unknown task, unusable data.
        VerificationFailed: the checkpoint is damaged.
    """
    check_tasks(tasks)
    plan = Plan.read(run.plan)
    checkpoint, manifest = store.choose(run.checkpoints, step)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    bound = max_tokens or MAX_TOKENS[kind]
    if data is None:
        documents, target = _held_out(run, config, bound), run.evaluation
    else:
        folder = folder_for(data, run.path / "evaluation")
        like_run = _like_run(run, config, data)
        documents = _prepared(like_run, Path(plan.model), folder / "data", bound=bound, say=on_progress)
        target = folder / EvaluationReport.file_name
    context = read_shape(Path(plan.model)).context_length
    tokenizer = load_tokenizer(run.data / "tokenizer", trust_remote_code=config.trust_remote_code)
    work = _work(documents, tokenizer, tasks, kind=kind, context=context)
    model = loading.load_model(
        Path(plan.model),
        precision=_precision(plan.precision, kind),
        from_scratch=config.from_scratch,
        trust_remote_code=config.trust_remote_code,
        seed=config.train.seed,
    )
    base = None
    if not config.from_scratch:  # random weights are no model to compare with
        on_progress(f"scoring the base model on {len(documents.documents)} documents")
        base = _ask(model, work)
    if plan.method == "lora":
        model = restore_adapters(model, checkpoint)
    load_weights(model, checkpoint, verified=manifest)
    on_progress(f"scoring the tuned model on {len(documents.documents)} documents")
    tuned = _ask(model, work)
    report = _report(work, base=base, tuned=tuned, step=manifest.step)
    report.write(target)
    return report


def evaluate_model(
    model_folder: Path,
    *,
    data: str,
    tasks: Sequence[str] = (),
    precision: str | None = None,
    trust_remote_code: bool = False,
    max_tokens: int | None = None,
    on_progress: Say = lambda message: None,
) -> EvaluationReport:
    """Evaluate a Hugging Face folder on a file of examples; there is nothing to compare with.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``; the one the weights are stored in if None.

    Raises:
        UserError: unusable model or data, unknown task.
    """
    check_tasks(tasks)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    stored = str(getattr(loading.load_config(model_folder, trust_remote_code=trust_remote_code), "dtype", None))
    names = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
    config = parse_config(
        {
            "model": str(model_folder),
            "data": data,
            "evaluate": {"validation": 0.0},
            "trust_remote_code": trust_remote_code,
        }
    )
    with tempfile.TemporaryDirectory(prefix="foretune-evaluate-") as scratch:
        folder = Path(scratch) / "data"
        bound = max_tokens or MAX_TOKENS[kind]
        documents = _prepared(config, model_folder, folder, bound=bound, say=on_progress)
        context = read_shape(model_folder).context_length
        tokenizer = load_tokenizer(folder / "tokenizer", trust_remote_code=trust_remote_code)
        work = _work(documents, tokenizer, tasks, kind=kind, context=context)
        model = loading.load_model(
            model_folder,
            precision=_precision(precision or names.get(stored, "fp32"), kind),
            trust_remote_code=trust_remote_code,
        )
        on_progress(f"scoring {len(documents.documents)} documents")
        return _report(work, base=None, tuned=_ask(model, work), step=None)


def _held_out(run: RunFolder, config: Config, bound: int) -> Documents:
    prepared = PreparedDataset.read(run.data / PreparedDataset.file_name)
    if prepared.validation_documents == 0:
        raise UserError(
            "evaluate.validation",
            config.evaluate.validation,
            "no documents were held out",
            "give a file of examples with --data, or set evaluate.validation to a share such as 0.02 and train anew",
        )
    return held_out(run.data, max_tokens=bound, seed=config.train.seed)


def _like_run(run: RunFolder, config: Config, data: str) -> Config:
    """The run's configuration for other data: the same template, system text and row length; nothing held out."""
    prepared = PreparedDataset.read(run.data / PreparedDataset.file_name)
    template = run.data / "tokenizer" / "chat_template.jinja"
    options = config.data.model_dump(exclude={"sources", "format", "chat_template"})
    return config.model_copy(
        update={
            "data": DataConfig(
                sources=[DataSource(path=data)],
                chat_template=str(template) if template.is_file() else config.data.chat_template,
                **options,
            ),
            "train": config.train.model_copy(update={"max_length": prepared.max_length}),
            "evaluate": config.evaluate.model_copy(update={"validation": 0.0}),
        }
    )


def _prepared(config: Config, model: Path, folder: Path, *, bound: int, say: Say) -> Documents:
    prepare(config, model_folder=model, out=folder, on_progress=say)
    return whole_folder(folder, name=config.data.sources[0].path, max_tokens=bound, seed=config.train.seed)


def _precision(trained: str, kind: str) -> str:
    """The trained one, but float32 for fp16 on a CPU, which has no fast arithmetic for it."""
    return "fp32" if trained == "fp16" and kind == "cpu" else trained


def _work(data: Documents, tokenizer: Any, tasks: Sequence[str], *, kind: str, context: int) -> _Work:
    """Choose what is answered, and refuse tasks that the data can't serve, before a model is loaded.

    Prompt and answer together stay within the model's context: beyond it some families fail, and others talk nonsense.
    """
    answered = [document for document in data.documents if document.is_answered and document.answer]
    longest = max((len(document.answer) for document in answered), default=0)
    task_tokens = min(_LONGEST_TASK_ANSWER, longest + longest // 2 + 8, max(context // 2, 1))
    fitting = [document for document in answered if len(document.prompt) + task_tokens <= context]
    for_tasks = fitting[: _TASK_DOCUMENTS[kind]] if tasks else []
    references = [_text(tokenizer, document.answer) for document in for_tasks]
    check_documents(tasks, for_tasks, references)
    sample_tokens = min(_SAMPLE_TOKENS[kind], max(context // 4, 1))
    room = min(_LONGEST_SAMPLE_PROMPT, context - sample_tokens)
    samples = [document for document in data.documents if document.answer and len(document.prompt) <= room]
    return _Work(
        data, tokenizer, tasks, kind, samples[:_NUM_SAMPLES], sample_tokens, for_tasks, references, task_tokens
    )


def _ask(model: Any, work: _Work) -> _Result:
    """Score the documents, and answer the samples' and the tasks' prompts."""
    device = fitting_device(model)
    model.to(device)
    scores = score_documents(model, work.data.batches, device)
    samples = _answers(model, work, work.samples, work.sample_tokens)
    answers = _answers(model, work, work.answered, work.task_tokens)
    return _Result(scores, samples, answers)


def _answers(model: Any, work: _Work, documents: Sequence[Document], max_new_tokens: int) -> list[str]:
    if not documents:
        return []
    # The model's own settings may know the end of a text only, not the end of a turn of the run's template.
    model.generation_config.eos_token_id = stop_token_ids(work.tokenizer)
    prompts = [document.prompt for document in documents]
    return continue_tokens(model, work.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=_BATCH[work.kind])


def _report(work: _Work, *, base: _Result | None, tuned: _Result, step: int | None) -> EvaluationReport:
    results = [tuned] if base is None else [tuned, base]
    sums = np.stack([result.scores.nll_sum for result in results])
    targets = tuned.scores.target_tokens
    assert all((result.scores.target_tokens == targets).all() for result in results), "models saw other tokens"
    means = resampled_means(sums, targets.astype(np.float64))
    losses = sums.sum(axis=1) / targets.sum()
    estimates = [_estimate(float(loss), mean) for loss, mean in zip(losses, means, strict=True)]
    base_samples = base.samples if base is not None else [None] * len(tuned.samples)
    return EvaluationReport(
        data=work.data.name,
        documents=len(targets),
        target_tokens=int(targets.sum()),
        base=estimates[1] if base is not None else None,
        tuned=estimates[0],
        difference=float(losses[0] - losses[1]) if base is not None else None,
        difference_interval=interval(means[0] - means[1]) if base is not None else None,
        tasks=score_answers(
            work.tasks, work.references, base=base.answers if base is not None else None, tuned=tuned.answers
        ),
        samples=[
            GenerationSample(
                prompt=_text(work.tokenizer, document.prompt),
                reference=_text(work.tokenizer, document.answer[: work.sample_tokens]),
                base=before,
                tuned=after,
            )
            for document, before, after in zip(work.samples, base_samples, tuned.samples, strict=True)
        ],
        step=step,
        documents_available=work.data.available,
        notes=_notes(work, len(targets)),
    )


def _estimate(loss: float, means: np.ndarray) -> LossEstimate:
    # exp overflows from 710 on; a loss near that is no model, and JSON has no infinity
    return LossEstimate(loss=loss, perplexity=math.exp(min(loss, 700.0)), interval=interval(means))


def _notes(work: _Work, scored: int) -> list[str]:
    notes = []
    if scored < work.data.available:
        notes.append(
            f"scored {scored:,} of {work.data.available:,} documents, chosen at random, to keep the evaluation short"
        )
    if scored < _FEW_DOCUMENTS:
        notes.append(f"{scored} documents are few: the intervals are rough")
    answered = len(work.answered)
    if work.tasks and answered < work.data.available:
        notes.append(f"tasks were answered on {answered:,} of {work.data.available:,} documents")
    return notes


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
