"""Material → one HTML file: charts and figures are put into a Jinja template whose every value is escaped.

Every value, wherever it stands in a template, passes `_Shown` before it is escaped: control characters that could steer
a terminal become text, and the run folder and the home folder are cut to their names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from foretune.artifacts import Plan
from foretune.config import Config, DataConfig, DataSource
from foretune.reporting import units
from foretune.reporting.page import charts
from foretune.reporting.page.ending import MARKS, ending_of, key_figures, next_commands, verdict
from foretune.reporting.page.history import Save, Step
from foretune.reporting.page.material import PROOF, SOAK, Material
from foretune.reporting.plan_picture import plan_svg
from foretune.reporting.plan_view import value_text
from foretune.reporting.results import folder_of
from foretune.reporting.tables import TEMPLATES, model_name, quantity_name, quantity_text

T = TypeVar("T")

_TEMPLATES = Path(__file__).parent / "templates"
#: A table of steps, faults or checkpoints shows so many rows.
_ROWS = 25
_TEXT_CHARACTERS = 1200


def run_page(material: Material) -> str:
    """The page of a run."""
    history, plan = material.history, material.plan
    return (
        _environment(material.run.path)
        .get_template("run.html.jinja")
        .render(
            m=material,
            title=_title(material),
            ending=ending_of(material),
            figures=key_figures(material),
            data_names=[_name(source.path) for source in material.config.data.sources] if material.config else [],
            next_commands=next_commands(material),
            memory_pictures=_memory_pictures(plan) if plan else [],
            charts=_training_charts(material),
            steps=_spread(history.counted),
            lost=sorted(((s, cause) for cause, s in material.account.lost.items() if s >= 0.05), reverse=True),
            phases=sorted(((s, name) for name, s in history.breakdown.items()), reverse=True),
            saves=_saves(material),
            causes=Counter(fault.cause for fault in history.faults).most_common(),
            loss_intervals=_loss_intervals(material),
            changed=_changed(material.config) if material.config else [],
            export_folders=[str(folder_of(model, Path("export"))) for model in material.exported],
        )
    )


def proof_page(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of a proof: `found` is what `read_proof` read."""
    cells: Sequence[Mapping[str, Any]] = found[PROOF]["cells"] if PROOF in found else []
    layouts = list(dict.fromkeys(_layout(cell) for cell in cells))
    matrix: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for cell in cells:
        row = matrix.setdefault((str(cell["fault"]), str(cell["phase"])), {})
        row.setdefault(_layout(cell), []).append(cell)
    faults: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        faults.setdefault(str(cell["fault"]), []).append(cell)
    head = found.get(PROOF) or found[SOAK]
    return (
        _environment(folder)
        .get_template("proof.html.jinja")
        .render(
            title=f"Proof of recovery: {folder.resolve().name}",
            head=head,
            passed=all(values["passed"] for values in found.values()),
            proof=found.get(PROOF),
            soak=found.get(SOAK),
            cells=cells,
            layouts=layouts,
            matrix=matrix,
            faults=faults,
        )
    )


def _layout(cell: Mapping[str, Any]) -> str:
    """The column of a cell. Where dropout is off, the expectation says so already."""
    return str(cell["layout"]).removesuffix(" no dropout")


class _Shown:
    """What becomes of a value before it is escaped."""

    def __init__(self, folder: Path) -> None:
        whole, home = folder.resolve(), Path.home()
        self._replaced = [(str(whole), whole.name)]
        if home != Path(home.anchor):
            self._replaced.append((str(home), "~"))

    def __call__(self, value: object) -> object:
        if value is None:
            return ""
        return value if isinstance(value, Markup) else self.text(str(value))

    def text(self, text: str) -> str:
        """Text without run folder, home folder and control characters; not escaped yet."""
        for path, name in self._replaced:
            text = name.join(re.split(re.escape(path) + r"(?![\w.-])", text))
        return units.printable(text)


def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_Shown(folder),
    )
    environment.filters |= {
        "bytes": units.bytes_text,
        "count": units.count_text,
        "plural": units.plural,
        "duration": units.duration_text,
        "loss": units.loss_text,
        "lr": units.learning_rate_text,
        "rate": units.rate_text,
        "share": lambda value: f"{value:.0%}",
        "words": lambda value: str(value).replace("_", " "),
        "name": _name,
        "value": value_text,
        "when": lambda seconds: _when(seconds, "%Y-%m-%d %H:%M UTC"),
        "iso": lambda seconds: _when(seconds, "%Y-%m-%dT%H:%M:%SZ"),
        "shortened": _shortened,
        "breakable": _breakable,
        "finite": math.isfinite,
        "quantity_name": quantity_name,
        "quantity": lambda value, name: quantity_text(name, float(value)),
        "model_name": model_name,
        "seconds_lost": _seconds_lost,
    }
    environment.globals |= {"chat_templates": TEMPLATES, "marks": MARKS, "verdict": verdict, "rows_shown": _ROWS}
    return environment


def _title(material: Material) -> str:
    model = material.plan.model if material.plan else material.config.model if material.config else None
    return model_name(model) if model else material.run.path.resolve().name


def _name(path: str) -> str:
    """A data set as people call it: a hub id whole, a path by its last part."""
    return PurePath(path).name if path.startswith(("/", "~", ".")) else path


def _when(seconds: float, form: str) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(form)


def _breakable(key: str) -> Markup:
    """A dotted key that a narrow page may break where people would."""
    text = Markup.escape(units.printable(key))
    for sign in "._":
        text = text.replace(sign, sign + Markup("<wbr>"))
    return text


def _shortened(text: str, length: int = _TEXT_CHARACTERS) -> str:
    """Both ends of a long text, and what was left out."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]} […{len(text) - length // 2 * 2:,} characters…] {text[-(length // 2) :]}"


def _seconds_lost(cells: Sequence[Mapping[str, Any]]) -> str:
    """The most that a cell of these lost."""
    seconds = [float(cell["seconds_lost"]) for cell in cells if cell["seconds_lost"] is not None]
    return f"{max(seconds):.1f} s" if seconds else ""


def _memory_pictures(plan: Plan) -> list[Markup]:
    """For a wide page and for a narrow one. Their text is escaped where they are drawn."""
    return [Markup(plan_svg(plan)), Markup(plan_svg(plan, width=400))]


def _training_charts(material: Material) -> list[Markup]:
    history = material.history
    if not history.steps:
        return []
    shown = _Shown(material.run.path)
    faults = [
        (fault, f"{fault.cause.replace('_', ' ')}: {_shortened(shown.text(fault.detail), 200)}")
        for fault in history.faults
    ]
    saves = [(save, f"checkpoint of step {save.step:,}") for save in history.saves]
    marks = charts.Marks(
        faults=[charts.Mark(fault.at_step, said) for fault, said in faults],
        saves=[charts.Mark(save.step, said) for save, said in saves],
    )
    held_out = [(float(step), loss, "held-out loss") for step, loss in history.evaluated]
    losses = _points(history.counted, "loss")
    return [
        charts.step_chart("Loss, nats a token", losses, to_text=units.loss_text, marks=marks, extra=held_out),
        charts.step_chart(
            "Learning rate",
            _points(history.counted, "learning_rate"),
            to_text=units.learning_rate_text,
            marks=marks,
            linear=True,
        ),
        charts.step_chart(
            "Gradient norm", _points(history.counted, "grad_norm"), to_text=lambda value: f"{value:.3g}", marks=marks
        ),
        charts.step_chart(
            "Tokens a second", _points(history.counted, "tokens_per_second"), to_text=units.rate_text, marks=marks
        ),
        charts.time_chart(
            history.launches,
            faults=[(fault.clock, fault.at_step, said) for fault, said in faults],
            saves=[(save.clock, save.step, said) for save, said in saves],
        ),
    ]


def _points(steps: Sequence[Step], name: str) -> list[charts.Point]:
    return [(step.number, getattr(step, name)) for step in steps]


def _saves(material: Material) -> list[tuple[int, Save | None, float | None, bool]]:
    """Of each checkpoint: step, how it was written, its held-out loss, whether it is still there; the newest last."""
    kept = {checkpoint.step: checkpoint for checkpoint in material.checkpoints}
    written = {save.step: save for save in material.history.saves}
    rows = [
        (step, written.get(step), kept[step].held_out_loss if step in kept else None, step in kept)
        for step in sorted({*kept, *written})
    ]
    return [row for row in rows if row[3]] if len(rows) > _ROWS else rows


def _loss_intervals(material: Material) -> Markup:
    report = material.evaluation
    if report is None:
        return Markup("")
    rows = [("tuned" if report.base else "model", report.tuned.loss, report.tuned.interval)]
    if report.base is not None:
        rows.insert(0, ("base", report.base.loss, report.base.interval))
    return charts.interval_chart(rows, name="loss, nats a token, with 95 % intervals", to_text=units.loss_text)


def _changed(config: Config) -> list[tuple[str, str]]:
    """Keys that are not at their default, dotted, with their values."""
    values = config.model_dump(mode="json")
    source = DataSource(path=config.data.sources[0].path)
    default = Config(model=config.model, data=DataConfig(sources=[source])).model_dump(mode="json")
    rows = [("model", config.model)]
    rows += [(f"data.sources[{n}].path", item.path) for n, item in enumerate(config.data.sources)]

    def compare(prefix: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        for key, value in now.items():
            if isinstance(value, Mapping) and isinstance(before.get(key), Mapping):
                compare(f"{prefix}{key}.", value, before[key])
            elif value != before.get(key) and f"{prefix}{key}" != "data.sources":
                rows.append((f"{prefix}{key}", str(value)))

    compare("", values, default)
    return rows


def _spread(items: Sequence[T], most: int = _ROWS) -> list[T]:
    """At most so many, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]
