"""The command line: one verb a stage. Parse, call, print; no logic. Nothing heavy is imported before it is needed.

Results go to stdout (as JSON with ``--json``), talk to stderr. Exit codes: `foretune.__main__`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretune.config import Config, load_config
from foretune.config.load import all_keys
from foretune.errors import UserError
from foretune.reporting.output import results_alone_on_stdout, show

if TYPE_CHECKING:
    from foretune.pipeline.road import StageName

app = typer.Typer(
    name="foretune",
    help="Fine-tune a language model on DeepSpeed from two values, a model and a data file.\n\n"
    "Example:  foretune run --model gpt2 --data examples.jsonl",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", help="Configuration; options win over it.")]
Model = Annotated[str | None, typer.Option("--model", help="Hub id, folder or .gguf file.")]
Data = Annotated[
    list[str] | None, typer.Option("--data", help="File, folder, glob or hub data set; may be given several times.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Run folder; runs/MODEL-DATA-HASH if not given.", show_default=False)
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, as in --set train.learning_rate=1e-5.")
]
Method = Annotated[str | None, typer.Option("--method", help="full: train every weight; lora: low-rank adapters.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the data.")]
Nproc = Annotated[int | None, typer.Option("--nproc", help="Ranks on this machine; one per GPU if not given.")]
FromScratch = Annotated[bool | None, typer.Option("--from-scratch", help="Random weights in the model's shape.")]
AllowNumerics = Annotated[
    bool | None, typer.Option("--allow-numerics", help="Let the plan propose what changes numerics.")
]
Deterministic = Annotated[bool | None, typer.Option("--deterministic", help="Bit-identical repetition on a GPU.")]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Step = Annotated[int | None, typer.Option("--step", help="Of the checkpoint; the newest if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
_say_progress = partial(typer.echo, err=True)
RunOrModel = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run folder, or a model's folder or hub id.")]


def _keys_text() -> str:
    """Every key that --set takes, a paragraph for each section."""
    sections: dict[str, list[str]] = {}
    for key in all_keys():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).extend([name] if name else [])
    plain = ", ".join(section for section, names in sections.items() if not names)
    lines = [f"{section}.{{{', '.join(names)}}}" for section, names in sections.items() if names]
    return "\n\n".join(["Keys for --set and CONFIG.yaml:", plain, *lines])


@app.command(epilog=_keys_text())
def run(
    *,
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    settings: Settings = None,
    method: Method = None,
    epochs: Epochs = None,
    nproc: Nproc = None,
    from_scratch: FromScratch = None,
    allow_numerics: AllowNumerics = None,
    deterministic: Deterministic = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go the whole road: prepare, plan, train, evaluate, export.

    What is complete is skipped; after an interruption, run the same command again.

    Example:  foretune run --model gpt2 --data examples.jsonl
    """
    _travel("export", **locals())


@app.command()
def plan(
    *,
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    hardware: Annotated[
        str, typer.Option("--hardware", help="auto, or for example 8xH100-80GB, 2x8xA100-40GB, 1xRTX4090, 4xcpu.")
    ] = "auto",
    why: Annotated[
        bool, typer.Option("--why", help="Show every alternative, and the arithmetic line by line.")
    ] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Also draw the memory of each strategy as SVG.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Also build DeepSpeed's engine on fake tensors, and compare.")
    ] = False,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens of one pass over the data.")] = None,
    deepspeed_config: Annotated[
        Path | None,
        typer.Option("--deepspeed-config", metavar="FILE", help="Also write DeepSpeed's JSON; - is stdout."),
    ] = None,
    out: Out = None,
    settings: Settings = None,
    method: Method = None,
    epochs: Epochs = None,
    nproc: Nproc = None,
    from_scratch: FromScratch = None,
    allow_numerics: AllowNumerics = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
) -> None:
    """Decide how to train and say why: ZeRO stage, offload, micro-batch, memory, time. Nothing runs.

    Example:  foretune plan --model Qwen/Qwen2.5-7B --hardware 2xA100-80GB
    """
    from foretune.pipeline import NO_DATA, confirm, plan_for, plan_for_deepspeed_alone
    from foretune.reporting.plan_view import dry_run_view, plan_view

    wanted = _wanted(
        config,
        settings,
        model=model,
        data=data or ([NO_DATA] if config is None else None),
        method=method,
        epochs=epochs,
        from_scratch=from_scratch,
        allow_numerics=allow_numerics,
        trust_remote_code=trust_remote_code,
    )
    given: dict[str, Any] = {"hardware": hardware, "nproc": nproc, "out": out, "tokens": tokens}
    made = plan_for(wanted, **given)
    if deepspeed_config is not None:
        elsewhere = plan_for_deepspeed_alone(made, wanted, **given)
        if elsewhere is not made:
            instead = f"{elsewhere.strategy_name}, {elsewhere.predicted.step_seconds:.3g} s a step"
            typer.echo(f"DeepSpeed alone does not stream the optimizer; its file is for {instead}", err=True)
        text = json.dumps(elsewhere.deepspeed_config, indent=2) + "\n"
        if str(deepspeed_config) == "-":
            typer.echo(text, nl=False)
            return
        _write("--deepspeed-config", deepspeed_config, text)
    if svg is not None:
        from foretune.reporting.plan_picture import plan_svg

        _write("--svg", svg, plan_svg(made))
    confirmed = confirm(made, wanted) if dry_run else None
    if as_json:
        values = made.model_dump(mode="json")
        typer.echo(json.dumps(values if confirmed is None else {**values, "dry_run": confirmed}, indent=2))
    else:
        show(lambda width: [plan_view(made, why=why, width=width)])
        if confirmed is not None:
            show(lambda width: [dry_run_view(confirmed, width=width)])
    if confirmed is not None and not confirmed["agrees"]:
        raise typer.Exit(1)


@app.command()
def prepare(
    *,
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Clean, template, tokenise and pack the data; print what was kept and what was dropped.

    Example:  foretune prepare --model gpt2 --data examples.jsonl --out runs/first
    """
    _travel("prepare", **locals())


@app.command(epilog=_keys_text())
def train(
    *,
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    settings: Settings = None,
    method: Method = None,
    epochs: Epochs = None,
    nproc: Nproc = None,
    from_scratch: FromScratch = None,
    allow_numerics: AllowNumerics = None,
    deterministic: Deterministic = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prepare, plan and train; go on from the newest checkpoint if there is one.

    Example:  foretune train --model gpt2 --data examples.jsonl --method lora --out runs/first
    """
    _travel("train", **locals())


@app.command()
def evaluate(
    what: RunOrModel,
    data: Annotated[str | None, typer.Option("--data", help="Examples; a run's held-out ones if not given.")] = None,
    *,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Evaluation task; may be given several times.")
    ] = None,
    step: Step = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
) -> None:
    """Measure loss and perplexity, of a run base against tuned, with confidence intervals.

    Example:  foretune evaluate runs/first --data test.jsonl
    """
    from foretune import pipeline
    from foretune.reporting.tables import evaluation_view

    with results_alone_on_stdout():
        report = pipeline.evaluate(
            what,
            data,
            tasks=task or (),
            step=step,
            trust_remote_code=trust_remote_code or False,
            on_progress=_say_progress,
        )
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        show(lambda width: [evaluation_view(report, width=width)])


@app.command()
def export(
    what: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    to: Annotated[Path | None, typer.Option("--to", help="Folder to write; RUN/export if not given.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="full, adapter or merged; all that there are if not given.")
    ] = None,
    step: Step = None,
    as_json: Json = False,
) -> None:
    """Write a run's newest checkpoint as a Hugging Face folder, verified against what training computed.

    Example:  foretune export runs/first --to my-model
    """
    from foretune import pipeline
    from foretune.artifacts import RunFolder
    from foretune.reporting.results import folder_of

    with results_alone_on_stdout():
        models = pipeline.export(what, to, kinds=kind or ("auto",), step=step, on_progress=_say_progress)
    if as_json:
        typer.echo(json.dumps([model.model_dump(mode="json") for model in models], indent=2))
        return
    target = to or RunFolder(Path(what)).export
    for model in models:
        verified = f"logits differ by {model.max_logit_difference:.2g}, {model.logit_tolerance:.2g} is allowed"
        typer.echo(f"{folder_of(model, target)}  step {model.step}, {model.dtype}; verified: {verified}")


@app.command()
def serve(
    what: RunOrModel,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; any but loopback needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on.")] = 8000,
    api_key: Annotated[str | None, typer.Option("--api-key", help="Key that every request must carry.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="auto, transformers or vllm.")] = "auto",
) -> None:
    """Serve over OpenAI-style HTTP: chat completions, completions, models, streaming.

    Example:  foretune serve runs/first --port 8000
    """
    from foretune import pipeline

    pipeline.serve(what, host=host, port=port, api_key=api_key, engine=engine)


@app.command()
def chat(
    what: RunOrModel,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy; the model's own way if not given.")
    ] = None,
) -> None:
    """Talk to the model in this terminal.

    Example:  foretune chat runs/first
    """
    from foretune import pipeline

    pipeline.chat(what, prompt=prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def prove(
    *,
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    settings: Settings = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the proof.")] = Path("runs/proof"),
    matrix: Annotated[str, typer.Option("--matrix", help="small, or full: every fault, phase and stage.")] = "small",
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="WORD", help="Only cells whose name holds WORD.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0, help="Instead: kill at random times for so long.")
    ] = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Ranks on this machine.")] = 2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random moments.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Break a training on purpose, in every way, and compare what comes of it with one that was left alone.

    Example:  foretune prove
    """
    from foretune.pipeline.proof import prove as prove_all
    from foretune.pipeline.proof import soak
    from foretune.reporting.proof import cell_line, proof_view, soak_view

    if matrix not in ("small", "full"):
        raise UserError("--matrix", matrix, "is no matrix", "give small or full")
    anything = config is not None or model is not None or data is not None or settings
    wanted = _wanted(config, settings, model=model, data=data) if anything else None

    def say(message: str) -> None:
        if not quiet:
            _say_progress(message)

    with results_alone_on_stdout():
        result = (
            soak(wanted, out=out, minutes=minutes, nproc=nproc, seed=seed, on_progress=say)
            if minutes is not None
            else prove_all(
                wanted,
                out=out,
                matrix=matrix,  # type: ignore[arg-type]
                only=only or (),
                nproc=nproc,
                seed=seed,
                on_cell=lambda cell: say(cell_line(cell.model_dump())),
            )
        )
    values = result.model_dump(mode="json")
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    elif minutes is not None:
        show(lambda width: soak_view(values, out=out))
    else:
        told = {"seconds": values["seconds"], "left_out": values["left_out"], "out": out / result.file_name}
        show(lambda width: proof_view(values["cells"], **told))
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def report(
    what: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or the folder of a proof.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File to write; RUN/report.html if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what a run came to as one HTML file that loads nothing, whatever stage it is at.

    Example:  foretune report runs/first
    """
    from foretune import pipeline

    written = pipeline.report(what, out=out)
    typer.echo(json.dumps({"report": str(written)}) if as_json else str(written))


@app.command()
def demo(
    out: Out = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of training.")] = 0,
    nproc: Nproc = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go the road on an embedded example: a 135M model learns to turn sentences into knowledge-graph triples.

    Example:  foretune demo
    """
    from foretune.pipeline import DEMO_STAGES, demonstrate
    from foretune.reporting.live import open_view

    title = "demo: sentences become triples"
    with results_alone_on_stdout(), open_view(title=title, stages=DEMO_STAGES, quiet=quiet) as view:
        result = demonstrate(out=out, seed=seed, nproc=nproc, on_event=view)
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2, ensure_ascii=False))
        return
    show(lambda width: result.view())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is here, what is missing and what will hurt, each with the mend.

    Example:  foretune doctor
    """
    from foretune.doctor import examine
    from foretune.reporting.tables import findings_view

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding.as_json() for finding in findings], indent=2))
    else:
        show(lambda width: [findings_view(findings, width=width)])


#: Options whose key has another name.
_KEYS = {"epochs": "train.epochs", "deterministic": "train.deterministic"}


def _wanted(config: Path | None, settings: list[str] | None, **options: Any) -> Config:
    """The configuration that a file, --set and the named options ask for."""
    from foretune.pipeline.folder import expanded

    data = options.pop("data")
    options["data"] = data[0] if data and len(data) == 1 else data or None
    flags = {_KEYS.get(name, name): value for name, value in options.items()}
    file = None if config is None else expanded("CONFIG", config)
    return load_config(file, flags=flags, settings=settings or ())


def _travel(
    until: StageName,
    *,
    config: Path | None,
    settings: list[str] | None,
    out: Path | None,
    nproc: int | None = None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Go the road with a view on stderr, then print the result. The arguments are a verb's own."""
    from rich.text import Text

    from foretune.pipeline import STAGES, default_out, travel
    from foretune.reporting.live import open_view
    from foretune.reporting.results import run_view
    from foretune.reporting.tables import prepared_view

    wanted = _wanted(config, settings, **options)
    out = out or default_out(wanted)
    names = [wanted.model, *(source.path for source in wanted.data.sources)]
    title = " · ".join(Path(name).name for name in names) + f" → {out}"
    stages = STAGES[: STAGES.index(until) + 1]
    with results_alone_on_stdout(), open_view(title=title, stages=stages, quiet=quiet) as view:
        result = travel(wanted, out=out, nproc=nproc, until=until, on_event=view)
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2, ensure_ascii=False))
    elif until == "prepare":
        show(lambda width: [prepared_view(result.prepared, width=width), Text(f"prepared: {result.out / 'data'}")])
    else:
        show(
            lambda width: run_view(
                result.out,
                checkpoint=result.checkpoint,
                exported=result.exported,
                evaluation=result.evaluation,
                seconds_by_phase=result.seconds_by_phase,
                predicted_against_measured=result.predicted_against_measured,
                account=result.account,
                report=result.report,
                width=width,
            )
        )


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            option,
            str(path),
            f"can't be written ({error.strerror})",
            "give a file in a folder that is yours",
        ) from None
