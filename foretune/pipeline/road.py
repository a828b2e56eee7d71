"""The road: prepare ─▶ plan ─▶ train ─▶ evaluate ─▶ export. What is complete on disk is skipped, and that is said.

In: a `Config` and a run folder.  Out: the artifact of every stage in that folder, and a `RunResult`.

Stages meet in files, so any of them can be killed and the same call made again. No torch here: the stages that need it
import it when their turn comes.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

from foretune import planning
from foretune.artifacts import (
    Checkpoint,
    EvaluationReport,
    ExportedModel,
    Plan,
    PreparedDataset,
    RunFolder,
)
from foretune.checkpoint import layout, store
from foretune.config import Config
from foretune.errors import TrainingStopped, UserError
from foretune.events import EventKind, Journal, read_events
from foretune.model.source import resolve_model
from foretune.pipeline.first_look import look_at_model
from foretune.pipeline.folder import calibration_file, default_out, expanded, opened, resolved, settle
from foretune.reporting.goodput import Goodput, goodput
from foretune.reporting.tables import evaluation_summary, plan_summary, prepared_summary
from foretune.reporting.units import bytes_text, loss_text, plural

StageName = Literal["prepare", "plan", "train", "evaluate", "export"]
STAGES: tuple[StageName, ...] = ("prepare", "plan", "train", "evaluate", "export")

A = TypeVar("A", PreparedDataset, Plan, EvaluationReport)

#: Called with every event that is written to the journal.
EventSink = Callable[[Mapping[str, Any]], None]

#: What a checkpoint can't be carried over: the mathematics would change midway. (Ranks and stage may be others.)
_TIED = (
    "precision",
    "optimizer_dtype",
    "gradient_accumulation_dtype",
    "method",
    "global_batch_size",
    "max_length",
    "total_steps",
    "learning_rate",
)


@dataclass(frozen=True)
class RunResult:
    """What a run left behind; the later ones are None where the road was asked to end before them."""

    out: Path
    prepared: PreparedDataset
    plan: Plan | None = None
    checkpoint: Path | None = None
    loss: float | None = None  # of the last step, nats per target token
    evaluation: EvaluationReport | None = None
    exported: tuple[ExportedModel, ...] = ()
    seconds_by_phase: Mapping[str, float] | None = None
    predicted_against_measured: Mapping[str, Mapping[str, float]] | None = None
    account: Goodput | None = None
    report: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; None for what the road did not come to."""
        return {
            "out": str(self.out),
            "prepared": self.prepared.model_dump(mode="json"),
            "plan": self.plan and self.plan.model_dump(mode="json"),
            "checkpoint": self.checkpoint and str(self.checkpoint),
            "loss": self.loss,
            "evaluation": self.evaluation and self.evaluation.model_dump(mode="json"),
            "exported": [model.model_dump(mode="json") for model in self.exported],
            "seconds_by_phase": self.seconds_by_phase,
            "predicted_against_measured": self.predicted_against_measured,
            "account": self.account and self.account.as_json(),
            "report": self.report and str(self.report),
        }


def travel(
    config: Config,
    *,
    out: Path | None = None,
    nproc: int | None = None,
    until: StageName = "export",
    calibration: Path | None = None,
    on_event: EventSink = lambda event: None,
) -> RunResult:
    """Go the road up to and including the stage `until`.

    Args:
        config: what is wanted.
        out: the run folder; `default_out` if not given. One that holds a run of the same configuration is gone on with.
        nproc: ranks on this machine; one per GPU, or as planned for a CPU, if not given.
        calibration: file of what runs on this machine took against their plans; `calibration_file` if not given.
        on_event: called with every event of the journal as it is written.

    Raises:
        ForetuneError: see `foretune.errors`. The same call goes on where it ended.
    """
    if nproc is not None and nproc < 1:
        raise UserError("--nproc", nproc, "is not a number of ranks", "give 1 or more")
    config = resolved(config)
    run = RunFolder(expanded("--out", out or default_out(config)))
    last = STAGES.index(until)
    with opened(run, config) as same_wishes, _journal(run) as journal:
        road = _Road(run, config, nproc=nproc, same_wishes=same_wishes, journal=journal, on_event=on_event)
        road.calibration = planning.Calibration(calibration or calibration_file())
        model, prepared = road.prepare(weights=until != "prepare" and not config.from_scratch)
        if last < STAGES.index("plan"):
            return RunResult(run.path, prepared)
        plan = road.plan(model, prepared)
        settle(run, config)
        if last < STAGES.index("train"):
            return RunResult(run.path, prepared, plan)
        checkpoint = road.train(plan)
        evaluation = road.evaluate(prepared, checkpoint) if last >= STAGES.index("evaluate") else None
        exported = road.export(checkpoint) if last >= STAGES.index("export") else ()
        account = road.account()
        report = road.report() if road.has_news or not run.report.is_file() else run.report
        return RunResult(
            run.path, prepared, plan, checkpoint, road.loss(), evaluation, exported, *account, report=report
        )


class _Road:
    """The stages of one run. Each looks at what is on disk, does what is missing, and tells the journal."""

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        *,
        nproc: int | None,
        same_wishes: bool,
        journal: Journal,
        on_event: EventSink,
    ) -> None:
        self.run, self.config, self.nproc, self.same_wishes = run, config, nproc, same_wishes
        self.journal, self.on_event = journal, on_event
        self.data_reused = False
        self.has_news = False  # whether a stage did anything; a command that only skips touches no file
        self.calibration: planning.Calibration | None = None
        self.tell(EventKind.RUN_STARTED, out=str(run.path), versions=_versions())

    def tell(self, kind: EventKind, **payload: Any) -> None:
        """Write an event to the journal and hand it to whoever watches."""
        self.has_news |= kind == EventKind.STAGE_FINISHED
        self.on_event(self.journal.write(kind, **payload))

    def prepare(self, *, weights: bool) -> tuple[Path, PreparedDataset]:
        """Find the model (fetch or convert it, if need be), clean and pack the data."""
        from foretune.data.prepare import prepare

        say = self._progress_of("prepare")
        before = _read(PreparedDataset, self.run.data)
        with self._stage("prepare") as done:
            say(f"finding {self.config.model}")
            model = resolve_model(
                self.config.model,
                run_model_folder=self.run.model,
                trust_remote_code=self.config.trust_remote_code,
                weights=weights,
            )
            look_at_model(model, trust_remote_code=self.config.trust_remote_code, weights=weights)
            say("loading the tokenizer")
            prepared = prepare(self.config, model_folder=model, out=self.run.data, on_progress=say)
            self.data_reused = before is not None and before.fingerprint == prepared.fingerprint
            self._refuse_other_documents(prepared)
            done(prepared_summary(prepared), skipped=self.data_reused)
        for note in prepared.notes if not self.data_reused else ():
            self.tell(EventKind.NOTE, message=note)
        return model, prepared

    def plan(self, model: Path, prepared: PreparedDataset) -> Plan:
        with self._stage("plan") as done:
            cluster = planning.probe(self.nproc)
            plan = self._plan_on_disk(model, cluster)
            if plan is not None:
                done(plan_summary(plan), skipped=True)
                return plan
            plan = planning.make_plan(
                self._as_begun(),
                model_folder=model,
                cluster=cluster,
                prepared=prepared,
                calibration=self.calibration,
                vectors_apart=store.vectors_apart(self.run.checkpoints),
            )
            self._refuse_other_plan(plan)
            self._refuse_small_disk(plan)
            self.run.write_plan(plan)
            done(plan_summary(plan))
            return plan

    def train(self, plan: Plan) -> Path:
        """Train to the last step of the plan; returns the last checkpoint."""
        from foretune import launch

        # One to go on from is verified by the ranks, while their engine is built: gigabytes are not read twice.
        is_there = layout.newest_step(self.run.checkpoints) >= plan.total_steps
        found = store.newest_complete(self.run.checkpoints) if is_there else None
        if found is not None and found[1].step >= plan.total_steps:
            self.tell(EventKind.STAGE_SKIPPED, stage="train", reason=f"already done: {found[1].step} steps")
            return found[0]
        with self._stage("train", planned_memory_bytes=plan.predicted.gpu_memory_bytes) as done:
            self._progress_of("train")(f"starting {plural(plan.world_size, 'rank')}")
            began = self.run.events.stat().st_size
            try:
                launch.train(self.run, plan, self.config, on_event=self.on_event, replan=planning.after_out_of_memory)
            except TrainingStopped:
                self.report()  # what is worth reading most
                raise
            last = layout.newest_step(self.run.checkpoints)  # verified by the launcher
            self._compare_with(plan, began)
            self._tell_best(last)
            loss = self.loss()
            done(f"{last} steps" + ("" if loss is None else f" · loss {loss_text(loss)}"))
        return layout.folder_of(self.run.checkpoints, last)

    def evaluate(self, prepared: PreparedDataset, checkpoint: Path) -> EvaluationReport | None:
        if prepared.validation_documents == 0:
            self.tell(EventKind.STAGE_SKIPPED, stage="evaluate", reason="no documents were held out")
            return None
        step = Checkpoint.read(checkpoint / layout.MANIFEST).step
        known = _read(EvaluationReport, self.run.path)
        if known is not None and known.step == step and set(self.config.evaluate.tasks) <= set(known.tasks):
            self.tell(EventKind.STAGE_SKIPPED, stage="evaluate", reason=f"already done: {evaluation_summary(known)}")
            return known
        from foretune.evaluation import evaluate_run

        hide_progress_bars()
        with self._stage("evaluate") as done:
            say = self._progress_of("evaluate")
            report = evaluate_run(self.run, self.config, tasks=self.config.evaluate.tasks, on_progress=say)
            done(evaluation_summary(report))
        return report

    def export(self, checkpoint: Path) -> tuple[ExportedModel, ...]:
        step = Checkpoint.read(checkpoint / layout.MANIFEST).step
        there = exported_models(self.run.export)
        if there and all(model.step == step for model in there):
            self.tell(EventKind.STAGE_SKIPPED, stage="export", reason=f"already done: {self.run.export}")
            return there
        from foretune.exporting import export_run

        with self._stage("export") as done:
            exported = export_run(self.run, to=self.run.export, on_progress=self._progress_of("export"))
            worst = max(model.max_logit_difference for model in exported)
            done(f"{self.run.export} · verified, logits differ by at most {worst:.1g}")
        return tuple(exported)

    def loss(self) -> float | None:
        """The loss of the newest step in the journal."""
        losses = [event["loss"] for event in read_events(self.run.events) if event["kind"] == EventKind.STEP]
        return float(losses[-1]) if losses else None

    def report(self) -> Path | None:
        """Write RUN/report.html. A page that can't be written is a note: it never takes a run's result away."""
        from foretune.reporting.page import write_report

        try:
            return write_report(self.run.path)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            self.tell(EventKind.NOTE, message=f"no report was written: {type(error).__name__}: {reason}")
            return None

    def account(self) -> tuple[dict[str, float] | None, dict[str, dict[str, float]] | None, Goodput]:
        """Where the time went, and predicted against measured, as the journal last told them; and goodput."""
        phases, compared = None, None
        events = list(read_events(self.run.events))
        for event in events:
            if event["kind"] == EventKind.BREAKDOWN:
                phases = event["seconds_by_phase"]
            elif event["kind"] == EventKind.PREDICTED_AGAINST_MEASURED:
                compared = event["quantities"]
        return phases, compared, goodput(events)

    def _progress_of(self, name: StageName) -> Callable[[str], None]:
        return lambda message: self.tell(EventKind.PROGRESS, stage=name, message=message)

    @contextmanager
    def _stage(self, name: StageName, **payload: Any) -> Iterator[Callable[..., None]]:
        """Tell the start and the end of a stage. The caller calls what it is given with the summary when it is done."""
        self.tell(EventKind.STAGE_STARTED, stage=name, **payload)
        start = time.perf_counter()

        def done(summary: str, *, skipped: bool = False) -> None:
            if skipped:
                self.tell(EventKind.STAGE_SKIPPED, stage=name, reason=f"already done: {summary}")
            else:
                seconds = round(time.perf_counter() - start, 3)
                self.tell(EventKind.STAGE_FINISHED, stage=name, seconds=seconds, summary=summary)

        yield done

    def _plan_on_disk(self, model: Path, cluster: Any) -> Plan | None:
        """The plan this run already has, if nothing that it was made from has changed, or its training is complete.

        The memory that happens to be free is not compared: a run that began with a plan ends with it.
        """
        plan = _read(Plan, self.run.path)
        if plan is None or not self.data_reused:
            return None
        newest = store.newest_manifest(self.run.checkpoints)
        if newest is not None and newest.step >= plan.total_steps:
            return plan
        if not self.same_wishes:
            return None
        same_place = (plan.cluster.world_size, plan.cluster.accelerator.name) == (
            cluster.world_size,
            cluster.accelerator.name,
        )
        return plan if same_place and plan.model == str(model) else None

    def _refuse_other_documents(self, prepared: PreparedDataset) -> None:
        """Steps count batches of documents: those of a checkpoint can't be continued on others."""
        newest = store.newest_manifest(self.run.checkpoints)
        if newest is not None and newest.fingerprint != prepared.fingerprint:
            raise UserError(
                "data",
                self.config.data.sources[0].path,
                f"has changed since training began (the checkpoint of step {newest.step} is of other documents)",
                "give another --out, or put the old file back",
            )

    def _plan_begun(self) -> Plan | None:
        """The plan that this run's checkpoints were made with; None if there are none."""
        return None if store.newest_manifest(self.run.checkpoints) is None else _read(Plan, self.run.path)

    def _as_begun(self) -> Config:
        """The configuration to plan by: a training that has begun keeps its numbers where they were left to the plan.

        With leave to change them, another machine would get others.
        """
        before = self._plan_begun()
        if before is None:
            return self.config
        asked = self.config.plan
        of_states = ("optimizer_dtype", "gradient_accumulation_dtype")
        names = [name for name in of_states if getattr(asked, name) == "auto"]
        kept = {name: getattr(before, name) for name in names}
        return self.config.model_copy(update={"plan": asked.model_copy(update=kept)})

    def _refuse_other_plan(self, plan: Plan) -> None:
        """A training that has begun is not carried over to a plan that its checkpoints don't fit."""
        before = self._plan_begun()
        if before is None:
            return
        changed = [key for key in _TIED if getattr(before, key) != getattr(plan, key)]
        if before.keeps_states_apart or plan.keeps_states_apart:
            layout_keys = ("world_size", "zero_stage", "keeps_states_apart")
            changed += [key for key in layout_keys if getattr(before, key) != getattr(plan, key)]
        if changed:
            key = changed[0]
            fields = {"world_size": "--nproc", "keeps_states_apart": "plan.offload_optimizer"}
            shown = "offload_optimizer" if key == "keeps_states_apart" else key
            why = " (states in 8 bits, or offloaded in part, fit no other)" if key not in _TIED else ""
            raise UserError(
                fields.get(key, f"plan.{key}"),
                getattr(plan, shown),
                f"the checkpoints in {self.run.path} were made with {getattr(before, shown)}{why}",
                "give another --out, or go on with the command that began this run",
            )

    def _refuse_small_disk(self, plan: Plan) -> None:
        """Say now that the disk is too small, not at the first checkpoint."""
        used = sum(path.stat().st_size for path in self.run.checkpoints.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.run.path).free
        if plan.predicted.disk_bytes > free + used:
            raise UserError(
                "--out",
                str(self.run.path),
                f"checkpoints and export need {bytes_text(plan.predicted.disk_bytes)}, {bytes_text(free)} are free",
                "free some, give an --out on another disk, or set checkpoint.keep to 1",
            )

    def _tell_best(self, last: int) -> None:
        """Say where an earlier checkpoint has less held-out loss than the last one (`checkpoint.keep_best`)."""
        best = store.best_step(self.run.checkpoints) if self.config.checkpoint.keep_best else None
        if best is not None and best[0] != last:
            message = f"the least held-out loss, {loss_text(best[1])}, was that of step {best[0]}, which is kept"
            self.tell(
                EventKind.NOTE, message=f"{message}: foretune export {self.run.path} --step {best[0]} --to FOLDER"
            )

    def _compare_with(self, plan: Plan, began: int) -> None:
        """Tell what the plan predicted against what this launch measured (journal from byte `began` on).

        Nothing if it was changed on the way: what then ran was not predicted.
        """
        if Plan.read(self.run.plan).replanned:
            return
        events = list(read_events(self.run.events, offset=began))
        steps = [event for event in events if event["kind"] == EventKind.STEP]
        saved = [event for event in events if event["kind"] == EventKind.CHECKPOINT_SAVED]
        if not steps:
            return
        settled = steps[1:] or steps  # the first step pays for warming up
        measured = {
            "gpu_memory_bytes": max(event["memory_bytes"] for event in steps),
            "step_seconds": median(event["seconds"] for event in settled),
            "tokens_per_second": median(event["tokens_per_second"] for event in settled),
        }
        if saved:
            measured["checkpoint_bytes"] = saved[-1]["bytes"]
        quantities = {
            name: {"predicted": getattr(plan.predicted, name), "measured": value} for name, value in measured.items()
        }
        # The allocator that is measured does not see the CUDA context.
        quantities["gpu_memory_bytes"]["predicted"] -= plan.predicted.gpu_memory_parts.get("context", 0)
        self.tell(EventKind.PREDICTED_AGAINST_MEASURED, quantities=quantities)
        if self.calibration is not None:
            self.calibration.learn(plan, step_seconds=measured["step_seconds"], steps=len(steps))


def exported_models(folder: Path) -> tuple[ExportedModel, ...]:
    """The verified models in an export folder: itself, or one in each of its folders."""
    manifests = [folder / ExportedModel.file_name, *sorted(folder.glob(f"*/{ExportedModel.file_name}"))]
    return tuple(ExportedModel.read(path) for path in manifests if path.is_file())


def hide_progress_bars() -> None:
    """Of transformers, which would draw over ours. Call it where transformers is about to be imported anyway."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def _journal(run: RunFolder) -> Iterator[Journal]:
    journal = Journal(run.events)
    try:
        yield journal
    finally:
        journal.close()


def _read(kind: type[A], folder: Path) -> A | None:
    """An artifact that may be missing or damaged; then its stage makes it again."""
    try:
        return kind.read(folder / kind.file_name)
    except UserError:
        return None


def _versions() -> dict[str, str]:
    """Versions of what decides the numbers, for the journal."""
    names = ("foretune", "torch", "deepspeed", "transformers", "peft", "datasets")
    return {name: importlib.metadata.version(name) for name in names}
