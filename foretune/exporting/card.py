"""The model card: what this model is made of, how well it does, how to use it, how to make it again.

in: the artifacts of a run   out: README.md, Markdown with the front matter that the Hugging Face hub reads

It is meant to be published: paths of this machine are cut to their last part.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path, PurePath
from typing import Any, Literal

from foretune.artifacts import EvaluationReport, LossEstimate, Plan, PreparedDataset
from foretune.config import Config, DataConfig, DataSource, parse_setting

#: Configuration keys that a command line gives by another name, or that name places.
_NOT_SETTINGS = {"model", "method", "from_scratch"}
_LICENCE = "Unknown: it follows from the licences of the base model and of the data. State it before you publish."


def model_card(
    config: Config,
    plan: Plan,
    prepared: PreparedDataset,
    *,
    kind: Literal["full", "merged", "adapter"],
    name: str,
    step: int,
    verified: str,
    evaluation: EvaluationReport | None,
) -> str:
    """Render the card.

    Args:
        kind: what the folder holds.
        name: of the model, for the headline.
        step: optimizer steps it was trained for.
        verified: one sentence on what the export was held against.
        evaluation: of this very step, if there is one.
    """
    parts = [
        _front_matter(config, kind),
        f"# {name}\n\n{_what(config, plan, kind, step)}",
        _use(kind, chat=prepared.chat_template != "none", base=base_name(config)),
        _metrics(evaluation),
        _data(prepared),
        _training(plan, step),
        f"## Verification\n\n{verified}",
        f"## Licence\n\n{_LICENCE}",
        f"## Make it again\n\n```\n{command(config, plan)}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_name(config: Config) -> str:
    """The base model as the world may know it: a hub id whole, a path by its last part."""
    looks_local = Path(config.model).exists() or config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    return PurePath(config.model).name if looks_local else config.model


def command(config: Config, plan: Plan) -> str:
    """The command line that makes the same model: what is not at its default, and what ``auto`` became."""
    parts = ["foretune run", f"--model {base_name(config)}"]
    (first, *others) = config.data.sources
    sources = [{**source.model_dump(), "path": PurePath(source.path).name} for source in config.data.sources]
    if others or first != DataSource(path=first.path):
        parts.append(_setting("data.sources", sources))
    else:
        parts.append(f"--data {shlex.quote(sources[0]['path'])}")
    if config.method != "full":
        parts.append(f"--method {config.method}")
    if config.from_scratch:
        parts.append("--from-scratch")
    default = Config(model=config.model, data=DataConfig(sources=config.data.sources)).model_dump(mode="json")
    changed = _changed(config.model_dump(mode="json"), default, prefix="")
    changed |= {f"train.{key}": value for key, value in _decided(config, plan).items()}
    return " \\\n  ".join([*parts, *(_setting(key, value) for key, value in changed.items())])


def _decided(config: Config, plan: Plan) -> dict[str, Any]:
    """What was left to the plan and changes the mathematics; other hardware might decide otherwise."""
    keys = ("learning_rate", "global_batch_size", "max_length", "precision")
    return {key: getattr(plan, key) for key in keys if getattr(config.train, key) == "auto"}


def _changed(values: dict[str, Any], defaults: dict[str, Any], *, prefix: str) -> dict[str, Any]:
    """Dotted keys whose value is not the default."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not prefix and key in _NOT_SETTINGS:
            continue
        if isinstance(value, dict):
            found |= _changed(value, defaults[key], prefix=f"{prefix}{key}.")
        elif value != defaults[key]:
            found[prefix + key] = PurePath(value).name if key == "chat_template" else value
    return found


def _setting(key: str, value: Any) -> str:
    """``--set`` for a shell: plain text where it reads back as itself, else JSON, which is YAML."""
    plain = isinstance(value, str) and parse_setting(f"{key}={value}")[1] == value
    text = value if plain else json.dumps(value, ensure_ascii=False)
    return f"--set {shlex.quote(f'{key}={text}')}"


def _front_matter(config: Config, kind: str) -> str:
    lines = ["---", "license: unknown", f"library_name: {'peft' if kind == 'adapter' else 'transformers'}"]
    lines += [
        "pipeline_tag: text-generation",
        "tags:",
        "- foretune",
        f"- {'lora' if kind == 'adapter' else 'fine-tuned'}",
    ]
    base = base_name(config)
    if base == config.model and "/" in base and not config.from_scratch:  # the hub refuses what is no id of its own
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---"])


def _what(config: Config, plan: Plan, kind: str, step: int) -> str:
    base = base_name(config)
    how = {
        "full": f"`{base}` with every weight fine-tuned",
        "merged": f"`{base}` with a LoRA adapter (r = {config.lora.r}) merged into its weights",
        "adapter": f"a LoRA adapter (r = {config.lora.r}) for `{base}`",
    }[kind]
    if config.from_scratch:
        how = f"A model in the shape of `{base}`, trained from random weights"
    return f"{how[0].upper()}{how[1:]}, {step:,} steps, {plan.precision}. Made with foretune on DeepSpeed."


def _use(kind: str, *, chat: bool, base: str) -> str:
    load = 'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")'
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if kind == "adapter":
        load = (
            f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}", dtype="auto"), folder)'
        )
        imports = f"from peft import PeftModel\n{imports}"
    encode = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    if chat:
        encode = (
            'messages = [{"role": "user", "content": "Your question"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    code = f"""{imports}

folder = "PATH_OF_THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
{load}
{encode}
output = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
    return f"## Use\n\n```python\n{code}\n```"


def _metrics(evaluation: EvaluationReport | None) -> str:
    if evaluation is None:
        return "## Results\n\nNot evaluated: no held-out documents were scored at this step."
    name = PurePath(evaluation.data).name
    lines = [
        "## Results",
        "",
        f"On {evaluation.documents:,} documents ({evaluation.target_tokens:,} target tokens) of {name}; "
        "95 % bootstrap intervals over documents.",
        "",
        "| | loss (nats per token) | 95 % interval | perplexity |",
        "|---|---|---|---|",
    ]
    if evaluation.base is not None:
        lines.append(_estimate_row("base", evaluation.base))
    lines.append(_estimate_row("this model", evaluation.tuned))
    if evaluation.difference is not None and evaluation.difference_interval is not None:
        low, high = evaluation.difference_interval
        lines += ["", f"Difference, paired by document: {evaluation.difference:+.4f} nats [{low:+.4f}, {high:+.4f}]."]
    for task, values in evaluation.tasks.items():
        lines += ["", f"{task}: " + ", ".join(f"{measure} {value:.4g}" for measure, value in values.items()) + "."]
    lines += [f"\n{note}" for note in evaluation.notes]
    return "\n".join(lines)


def _estimate_row(name: str, estimate: LossEstimate) -> str:
    low, high = estimate.interval
    return f"| {name} | {estimate.loss:.4f} | {low:.4f} to {high:.4f} | {estimate.perplexity:.3f} |"


def _data(prepared: PreparedDataset) -> str:
    lines = ["## Data", ""]
    for source in prepared.sources:
        weight = f", weight {source.weight:g}" if source.weight != 1 else ""
        lines.append(
            f"- `{PurePath(source.path).name}` ({source.format}{weight}): {source.rows_read:,} rows, "
            f"{source.documents:,} documents"
        )
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in prepared.dropped.items() if count) or "none"
    lines += [
        f"- Kept {prepared.documents:,} documents, held out {prepared.validation_documents:,}; duplicates "
        f"{prepared.duplicates:,}; dropped: {dropped}; truncated {prepared.truncated_documents:,} documents by "
        f"{prepared.truncated_tokens:,} tokens.",
        f"- {prepared.tokens:,} tokens an epoch, of which {prepared.target_tokens:,} are targets; rows of "
        f"{prepared.max_length:,} tokens, {prepared.fill:.1%} full.",
        f"- Chat template: {prepared.chat_template}.",
    ]
    return "\n".join(lines)


#: What is said of an optimizer whose states are not fp32.
_NUMERICS = {
    "fp32": "",
    "bf16": ", bf16 master weights and optimizer states",
    "8bit": ", 8-bit moments, no master weights",
}


def _training(plan: Plan, step: int) -> str:
    cluster = plan.cluster
    rows = {
        "steps": f"{step:,} of {plan.total_steps:,} planned",
        "rows per step": f"{plan.global_batch_size} of {plan.max_length:,} tokens",
        "optimizer": f"{plan.optimizer}, peak learning rate {plan.learning_rate:.3g}, {plan.schedule}, "
        f"{plan.warmup_steps} steps of warm-up",
        "precision": plan.precision + _NUMERICS[plan.optimizer_dtype],
        "parameters": f"{plan.parameters:,}, trained {plan.trainable_parameters:,}",
        "strategy": f"ZeRO stage {plan.zero_stage}, {plan.world_size} x {cluster.accelerator.name}, micro-batch "
        f"{plan.micro_batch_size_per_gpu}, accumulation {plan.gradient_accumulation_steps}",
    }
    lines = ["## Training", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *[f"| {name} | {value} |" for name, value in rows.items()]])
