"""The model card: true figures, nothing private, and a command that makes the same configuration."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from foretune.artifacts import EvaluationReport, LossEstimate, Plan, RunFolder
from foretune.config import load_config, parse_config, to_yaml
from foretune.exporting import export_run
from foretune.exporting.card import base_name, command


def report(step: int) -> EvaluationReport:
    return EvaluationReport(
        data="held-out documents", documents=30, target_tokens=1234, step=step,
        base=LossEstimate(loss=2.5, perplexity=12.18, interval=(2.4, 2.6)),
        tuned=LossEstimate(loss=1.25, perplexity=3.49, interval=(1.2, 1.3)),
        difference=-1.25, difference_interval=(-1.3, -1.2), notes=["scored 30 of 90 documents"],
        tasks={"gsm8k": {"tuned": 0.5, "base": 0.25}}, samples=[],
    )  # fmt: skip


def test_card_tells_what_was_done(make_run: Any, tmp_path: Path) -> None:
    run: RunFolder = make_run("llama-bf16-3", tmp_path / "run")
    report(step=2).write(run.evaluation)
    export_run(run)
    card = (run.export / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "unknown"
    assert front["library_name"] == "transformers"
    for fact in (
        "| base | 2.5000 | 2.4000 to 2.6000 | 12.180 |",
        "| this model | 1.2500 | 1.2000 to 1.3000 | 3.490 |",
        "-1.2500 nats [-1.3000, -1.2000]",
        "gsm8k: tuned 0.5, base 0.25",
        "scored 30 of 90 documents",
        "`examples.jsonl` (text): 10 rows, 9 documents",
        "dropped: empty 1",
        "ZeRO stage 3",
        "bf16",
        "## Licence\n\nUnknown",
        'AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
        "reproduces them: largest difference",
    ):
        assert fact in card, fact
    assert "/somewhere/private" not in card
    assert str(tmp_path) not in card
    assert Plan.read(run.plan).model not in card


def test_figures_of_another_step_are_not_shown(make_run: Any, tmp_path: Path) -> None:
    run: RunFolder = make_run("llama-fp32-2", tmp_path / "run")
    report(step=1).write(run.evaluation)
    export_run(run)
    card = (run.export / "README.md").read_text(encoding="utf-8")
    assert "2.5000" not in card
    assert "Not evaluated" in card


def test_adapter_card_says_what_it_belongs_to(make_run: Any, tmp_path: Path) -> None:
    run: RunFolder = make_run("lora-fp32-0", tmp_path / "run")
    export_run(run)
    adapter = (run.export / "adapter" / "README.md").read_text(encoding="utf-8")
    merged = (run.export / "merged" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in adapter
    assert "PeftModel.from_pretrained" in adapter
    assert "library_name: transformers" in merged
    assert "merged into its weights" in merged


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"method": "lora", "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
        {"train": {"learning_rate": 3e-05, "epochs": 2.5, "schedule": "linear", "precision": "fp32"}},
        {
            "data": {
                "sources": [{"path": "a b.jsonl", "weight": 0.5}, {"path": "b.jsonl"}],
                "system": "Be 'kind' / brief: yes",
            }
        },
        {"from_scratch": True, "data": {"sources": [{"path": "rows.jsonl"}], "system": "yes", "packing": False}},
        {"plan": {"zero_stage": 3, "offload_optimizer": 0.5}, "checkpoint": {"every": 7}},
    ],
)
def test_the_command_makes_the_same_configuration(make_run: Any, tmp_path: Path, values: dict[str, Any]) -> None:
    plan = Plan.read(make_run("llama-fp32-2", tmp_path / "run").plan)
    config = parse_config({"model": "org/name", "data": "rows.jsonl", **values})
    words = shlex.split(command(config, plan).replace("\\\n", " "))
    assert words[:2] == ["foretune", "run"]
    flags: dict[str, Any] = {}
    settings = []
    rest = iter(words[2:])
    for word in rest:
        if word == "--set":
            settings.append(next(rest))
        elif word == "--from-scratch":
            flags["from_scratch"] = True
        else:
            flags[word.removeprefix("--")] = next(rest)
    again = load_config(flags=flags, settings=settings)
    decided = {
        key: getattr(plan, key)
        for key in ("learning_rate", "global_batch_size", "max_length", "precision")
        if getattr(config.train, key) == "auto"
    }
    assert again == config.model_copy(update={"train": config.train.model_copy(update=decided)})


def test_paths_are_cut_to_names(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    names = {str(folder): "my-model", "HuggingFaceTB/SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M", "gpt2": "gpt2"}
    names |= {"/home/me/model.gguf": "model.gguf", "./here/model": "model"}
    for model, name in names.items():
        assert base_name(parse_config({"model": model, "data": "x.jsonl"})) == name


def test_a_private_template_path_is_cut(make_run: Any, tmp_path: Path) -> None:
    run: RunFolder = make_run("llama-fp32-2", tmp_path / "run")
    config = load_config(run.config)
    template = tmp_path / "secret" / "mine.jinja"
    data = config.data.model_copy(update={"chat_template": str(template)})
    run.config.write_text(to_yaml(config.model_copy(update={"data": data})), encoding="utf-8")
    export_run(run)
    card = (run.export / "README.md").read_text(encoding="utf-8")
    assert "data.chat_template=mine.jinja" in card
    assert "secret" not in card
