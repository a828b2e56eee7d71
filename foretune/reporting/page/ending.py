"""How a run ended, its key figures, and what to do next: what a reader wants to know before anything else."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foretune.artifacts import EvaluationReport
from foretune.reporting.page.material import Material
from foretune.reporting.units import bytes_text, count_text, duration_text, loss_text, plural, rate_text

Tone = Literal["good", "going", "bad"]

#: A mark beside the colour, which not everybody sees.
MARKS: dict[Tone, str] = {"good": "✓", "going": "▸", "bad": "✗"}


@dataclass(frozen=True)
class Ending:
    """The state of a run in a word and a sentence."""

    tone: Tone
    word: str
    sentence: str = ""

    @property
    def mark(self) -> str:
        return MARKS[self.tone]


@dataclass(frozen=True)
class Figure:
    """One large number."""

    name: str
    value: str
    remark: str = ""


def ending_of(material: Material) -> Ending:
    """What the run came to, or where it stands."""
    history, total = material.history, material.total_steps
    at = f"step {history.last_step:,} of {total:,}" if total else f"step {history.last_step:,}"
    if material.in_use:
        left = history.seconds_left
        eta = f", about {duration_text(left)} to go" if left is not None and history.unfinished_stage == "train" else ""
        return Ending("going", "running", f"It is at work: {history.unfinished_stage or 'starting'}, {at}{eta}.")
    if history.gave_up and history.faults and not material.trained:
        fault = history.faults[-1]
        where = "".join(
            f", {name} {value}" for name, value in (("rank", fault.rank), ("step", fault.step)) if value is not None
        )
        return Ending("bad", "stopped by a fault", f"{fault.detail}{where}; {fault.why}. {_safe_until(material)}")
    if material.diagnosis is not None and not material.trained:
        return Ending("bad", "stopped by a mistake", f"{material.diagnosis}. {_safe_until(material)}")
    if material.trained:
        return _after_training(material)
    if history.stop_reason is not None:
        said = f"It was asked to stop ({history.stop_reason}) and did so after {at}. {_safe_until(material)}"
        return Ending("going", "stopped as asked", said)
    if history.launches or history.unfinished_stage == "train":
        said = f"It ended at {at} without a word: it was killed, or the machine went down. {_safe_until(material)}"
        return Ending("bad", "broken off", said)
    return _before_training(material)


def _after_training(material: Material) -> Ending:
    step, broken = material.saved_step, material.history.unfinished_stage
    if broken in ("evaluate", "export"):
        return Ending("bad", f"broken off in {broken}", f"Training is complete: {plural(step, 'step')}.")
    if not material.exported:
        return Ending("good", "trained", f"All {plural(step, 'step')} are done; nothing is exported yet.")
    evaluated = ", evaluated" if material.evaluation else ""
    return Ending("good", "complete", f"Trained for {plural(step, 'step')}{evaluated}, exported and verified.")


def _before_training(material: Material) -> Ending:
    broken = material.history.unfinished_stage
    if broken is not None:
        return Ending("bad", f"broken off in {broken}", "That stage began and told no end.")
    if material.plan is not None:
        return Ending("going", "planned", "Nothing has been trained yet.")
    if material.prepared is not None:
        return Ending("going", "prepared", "The data is ready; nothing is planned yet.")
    return Ending("going", "begun", "No stage is complete yet.")


def _safe_until(material: Material) -> str:
    if not material.saved_step:
        return "No checkpoint was written."
    return f"Everything up to step {material.saved_step:,} is saved; the same command goes on from there."


def key_figures(material: Material) -> list[Figure]:
    """The few numbers that matter: what was measured, and what is planned where nothing is measured yet."""
    history, plan, figures = material.history, material.plan, []
    if material.evaluation is not None:
        figures.append(_evaluated(material.evaluation))
    elif history.evaluated:
        step, loss = history.evaluated[-1]
        figures.append(Figure("held-out loss", loss_text(loss), f"nats a token, at step {step:,}"))
    if history.steps:
        last = history.counted[-1]
        done = f"in {plural(len(history.steps), 'step')}" + (f" of {material.total_steps:,}" if plan else "")
        figures.append(Figure("tokens trained", count_text(history.tokens), done))
        if material.evaluation is None:
            figures.append(Figure("training loss", loss_text(last.loss), f"nats a token, at step {last.number:,}"))
        if (measured := history.tokens_per_second) is not None:
            ranks = f"over {plural(history.world_size, 'rank')}" if history.world_size else ""
            figures.append(Figure("tokens a second", rate_text(measured), ranks))
        useful, wall = duration_text(material.account.useful), duration_text(material.account.wall_seconds)
        faults = plural(material.account.faults, "failure")
        remark = f"{useful} of {wall} were steps that count; {faults}"
        figures.append(Figure("goodput", f"{material.account.share:.0%}", remark))
    elif plan is not None:
        predicted = plan.predicted
        most = f"of {bytes_text(plan.cluster.accelerator.memory_bytes)} a rank"
        rate = f"{rate_text(predicted.tokens_per_second)} tokens/s"
        figures += [
            Figure("memory, predicted", bytes_text(predicted.gpu_memory_bytes), most),
            Figure("a step, predicted", duration_text(predicted.step_seconds), rate),
            Figure(
                "whole training, predicted", duration_text(predicted.total_seconds), plural(plan.total_steps, "step")
            ),
        ]
    if not figures and (prepared := material.prepared) is not None:
        figures.append(Figure("documents kept", count_text(prepared.documents + prepared.validation_documents)))
        figures.append(
            Figure("tokens", count_text(prepared.tokens), f"{count_text(prepared.target_tokens)} are targets")
        )
    return figures


def _evaluated(report: EvaluationReport) -> Figure:
    tuned = loss_text(report.tuned.loss)
    if report.base is None or report.difference is None:
        low, high = report.tuned.interval
        return Figure("held-out loss", tuned, f"nats a token, 95 % interval {loss_text(low)} to {loss_text(high)}")
    remark = f"nats a token, base → tuned; {report.difference:+.3f}"
    if report.difference_interval is not None:
        low, high = report.difference_interval
        remark += f", 95 % interval {low:+.3f} to {high:+.3f}"
    return Figure("held-out loss", f"{loss_text(report.base.loss)} → {tuned}", remark)


def verdict(report: EvaluationReport) -> tuple[Tone, str]:
    """Whether the interval of the difference leaves its sign in no doubt."""
    low, high = report.difference_interval or (0.0, 0.0)
    if high < 0:
        return "good", "better"
    return ("bad", "worse") if low > 0 else ("going", "no difference shown")


def next_commands(material: Material) -> list[tuple[str, str]]:
    """(what it is for, the command), to be given in the folder that holds the run, unless the path says more."""
    run = shlex.quote(command_path(material.run.path))
    if material.exported and material.trained:
        return [
            ("talk to it", f"foretune chat {run}"),
            ("serve it over HTTP", f"foretune serve {run}"),
            ("measure it on other data", f"foretune evaluate {run} --data FILE"),
        ]
    config = shlex.quote(f"{command_path(material.run.path)}/config.yaml")
    if material.trained:
        return [("export it", f"foretune export {run}"), ("measure it", f"foretune evaluate {run}")]
    return [("go on", f"foretune run {config} --out {run}")]


def command_path(path: Path) -> str:
    """The run folder as a command names it: as it was given if that tells nothing of this machine, else its name."""
    return str(path) if not path.is_absolute() and ".." not in path.parts else path.resolve().name
