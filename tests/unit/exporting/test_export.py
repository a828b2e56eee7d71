"""Exports of real checkpoints, loaded by plain transformers and held against the engine that trained them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from foretune.artifacts import Checkpoint, ExportedModel, Plan, RunFolder
from foretune.checkpoint.store import commit
from foretune.errors import UserError, VerificationFailed
from foretune.exporting import companions, export, export_run

FULL = [
    *(f"llama-fp32-{stage}" for stage in range(4)),
    *(f"llama-bf16-{stage}" for stage in range(4)),
    "llama-bf16-1-fp32-sums", "llama-untied-bf16-3", "gpt2-bf16-2", "gpt2-fp32-3", "qwen2-fp32-2-offload",
    "qwen3-bf16-3-offload", "frozen-fp32-2", "frozen-fp32-3",
]  # fmt: skip
LORA = ["lora-fp32-0", "lora-bf16-2", "lora-bf16-3", "lora-gpt2-fp32-3"]
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '<unk>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def checkpoint_of(run: RunFolder) -> Path:
    return run.checkpoints / "step-00000002"


def assert_nothing_appeared(run: RunFolder) -> None:
    assert not run.export.exists()
    assert not list(run.path.glob(".export.*"))


def rewritten(run: RunFolder, change: Any) -> None:
    """Change the trained weights in a checkpoint's files and sign it anew, as if training had saved them so."""
    folder = checkpoint_of(run)
    for file in folder.glob("engine/mp_rank_00_model_states.pt"):
        state = torch.load(file, weights_only=False)
        change(state["module"])
        torch.save(state, file)
    _sign(run)


def _sign(run: RunFolder) -> None:
    folder = checkpoint_of(run)
    manifest = Checkpoint.read(folder / "manifest.json")
    commit(folder.rename(run.checkpoints / ".step-00000002.partial"), manifest)


@pytest.mark.parametrize("case", FULL)
def test_full_export_is_the_trained_model(make_run: Any, engine_checkpoints: Path, tmp_path: Path, case: str) -> None:
    run = make_run(case, tmp_path / "run")
    (exported,) = export_run(run)
    assert exported == ExportedModel.read(run.export / "foretune.json")
    truth = load_file(engine_checkpoints / case / "truth.safetensors")
    names = {name for name in truth if not name.startswith("fp32.")}
    found = stored(run.export)
    assert set(found) == names  # tied weights once, under their first name
    for name in names:
        assert torch.equal(found[name], truth[name]), name
    assert exported.kind == "full"
    assert exported.step == 2
    assert exported.parameters == sum(truth[name].numel() for name in names)
    assert exported.max_logit_difference <= exported.logit_tolerance
    assert not list(run.path.glob(".export.*"))


@pytest.mark.parametrize("case", LORA)
def test_lora_export_is_adapter_and_merged(make_run: Any, engine_checkpoints: Path, tmp_path: Path, case: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = make_run(case, tmp_path / "run")
    adapter, merged = export_run(run)
    assert (adapter.kind, merged.kind) == ("adapter", "merged")
    truth = load_file(engine_checkpoints / case / "truth.safetensors")
    found = stored(run.export / "adapter")
    assert len(found) == sum("lora_" in name and not name.startswith("fp32.") for name in truth) > 0
    for name, value in found.items():
        assert value.numel() > 0
        trained = truth[name.replace(".weight", ".default.weight")]
        assert torch.equal(value.to(trained.dtype), trained), name
    # The merged folder says what the adapter on its base says, in float32, where only one rounding is between them.
    base = AutoModelForCausalLM.from_pretrained(engine_checkpoints / case / "base", dtype=torch.float32)
    rows = load_file(checkpoint_of(run) / "reference.safetensors")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(run.export / "merged", dtype=torch.float32)
    with torch.no_grad():
        before = base(input_ids=rows, use_cache=False).logits
        adapted = PeftModel.from_pretrained(base, run.export / "adapter")(input_ids=rows, use_cache=False).logits
        found_logits = plain(input_ids=rows, use_cache=False).logits
    difference = float((found_logits - adapted).abs().max())
    assert difference <= (1e-5 if "fp32" in case else 0.02)
    assert float((adapted - before).abs().max()) > 5 * difference  # and the adapter does something


def test_files_are_what_the_manifest_says(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama-fp32-3", tmp_path / "run")
    (exported,) = export_run(run)
    files = {path.name for path in run.export.iterdir()} - {"foretune.json"}
    assert files == set(exported.files)
    for name, entry in exported.files.items():
        content = (run.export / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry.sha256, entry.bytes)
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"} <= files


@pytest.mark.parametrize(
    ("case", "dtype", "tied"),
    [
        ("llama-fp32-2", torch.float32, True),
        ("llama-bf16-3", torch.bfloat16, True),
        ("llama-untied-bf16-3", torch.bfloat16, False),
        ("gpt2-bf16-2", torch.bfloat16, True),
    ],
)
def test_dtype_and_tie_survive_a_reload(
    make_run: Any, tmp_path: Path, case: str, dtype: torch.dtype, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    run = make_run(case, tmp_path / "run")
    export_run(run)
    model = AutoModelForCausalLM.from_pretrained(run.export, dtype="auto")
    assert model.dtype == dtype
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    assert ("lm_head.weight" in stored(run.export)) == (not tied)
    config = json.loads((run.export / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    base = json.loads((Path(Plan.read(run.plan).model) / "config.json").read_text())
    assert config.get("use_cache", True) == base.get("use_cache", True)


def test_generation_stops_at_the_end_of_a_turn(make_run: Any, tmp_path: Path) -> None:
    """The template ends turns with another token (here <unk>, 0) than the one that ends texts (</s>, 2)."""
    run = make_run("llama-fp32-2", tmp_path / "run", chat_template=TEMPLATE)
    (exported,) = export_run(run)
    assert sorted(exported.eos_token_ids) == [0, 2]
    generation = json.loads((run.export / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == [0, 2]
    assert generation["bos_token_id"] == 1
    assert exported.chat_template_sha256 == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert (run.export / "chat_template.jinja").read_text() == TEMPLATE


PLAIN = """
import json
import sys
sys.modules["foretune"] = None  # any import of it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, reference, base in json.loads(sys.argv[1]):
    if base:
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_file(reference)
    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    index = rows["positions"][:, :, None].expand(-1, -1, logits.shape[-1])
    difference = float((logits.gather(1, index) - rows["logits"]).abs().max())
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    print(difference < 1e-4, answer.shape[1] > inputs["input_ids"].shape[1], text.startswith("<s>user"), folder)
"""


def test_plain_transformers_needs_no_foretune(make_run: Any, tmp_path: Path) -> None:
    """Full weights, merged ones and adapters, by one process."""
    exports = []
    for case, parts in (("llama-fp32-3", [""]), ("lora-fp32-0", ["merged", "adapter"])):
        run = make_run(case, tmp_path / case, chat_template=TEMPLATE)
        export_run(run)
        for part in parts:
            base = Plan.read(run.plan).model if part == "adapter" else ""
            exports.append((str(run.export / part), str(checkpoint_of(run) / "reference.safetensors"), base))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(exports)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Of each: the logits are training's to 1e-4, it answers, its template is the one that was given.
    assert done.stdout.splitlines() == [f"True True True {folder}" for folder, _, _ in exports]


def test_shards_hold_the_same_and_load(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    run = make_run("gpt2-fp32-3", tmp_path / "run")
    monkeypatch.setattr(export, "write_weights", partial(export.write_weights, max_shard_bytes=60_000))
    (exported,) = export_run(run)
    shards = sorted(path.name for path in run.export.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((run.export / "model.safetensors.index.json").read_text())
    for name, file_name in index["weight_map"].items():
        with safe_open(run.export / file_name, "pt") as file:
            assert name in file.keys()  # noqa: SIM118 (it is no dict)
    assert index["metadata"]["total_size"] == exported.parameters * 4


def test_an_earlier_export_is_replaced_whole(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama-fp32-2", tmp_path / "run")
    export_run(run)
    (run.export / "left-over.txt").write_text("of the earlier export")
    export_run(run)
    assert not (run.export / "left-over.txt").exists()
    assert sorted(path.name for path in run.path.iterdir() if "export" in path.name) == ["export"]


def test_what_a_killed_export_left_is_cleared(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama-fp32-2", tmp_path / "run")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = run.path / f".export.{ended.pid}.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    export_run(run)
    assert not left.exists()


# ── what must not pass ──────────────────────────────────────────────────────────────────────────────────────────────


def test_one_changed_number_in_the_written_file_is_found(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too small for the logits in bf16; the bytes tell."""
    run = make_run("llama-bf16-2", tmp_path / "run")
    original = companions.write_config

    def damage(config: Any, folder: Path, **options: Any) -> None:
        original(config, folder, **options)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(companions, "write_config", damage)
    with pytest.raises(VerificationFailed, match="reads back differently"):
        export_run(run)
    assert_nothing_appeared(run)


@pytest.mark.parametrize("case", ["llama-fp32-2", "llama-bf16-2", "gpt2-bf16-2"])
def test_weights_that_training_did_not_have_are_found(make_run: Any, tmp_path: Path, case: str) -> None:
    """The checkpoint itself is sound and signed, but its weights are not those that gave the reference logits."""
    run = make_run(case, tmp_path / "run")

    def shuffle(module: dict[str, torch.Tensor]) -> None:
        name = next(name for name in module if "embed_tokens" in name or "wte" in name)
        module[name].copy_(module[name].flip(0).clone())

    rewritten(run, shuffle)
    with pytest.raises(VerificationFailed, match=r"logits differ from training's by up to [\d.e+-]+ \(tolerance"):
        export_run(run)
    assert_nothing_appeared(run)


def test_a_small_change_of_a_weight_is_found_in_fp32(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama-fp32-2", tmp_path / "run")
    rewritten(run, lambda module: module["model.layers.1.mlp.down_proj.weight"].mul_(1.05))
    with pytest.raises(VerificationFailed, match=r"logits differ|diverge"):
        export_run(run)
    assert_nothing_appeared(run)


def test_nan_is_named(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama-fp32-2", tmp_path / "run")
    rewritten(run, lambda module: module["model.norm.weight"].view(-1)[3].fill_(float("nan")))
    with pytest.raises(VerificationFailed, match=r"model\.norm\.weight holds 1 values that are NaN"):
        export_run(run)
    assert_nothing_appeared(run)


def test_a_lost_tensor_is_found(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("gpt2-fp32-3", tmp_path / "run")
    original = export.iterate_weights

    def lossy(*arguments: Any, **options: Any) -> Any:
        return (item for item in original(*arguments, **options) if item[0] != "transformer.h.1.mlp.c_proj.bias")

    monkeypatch.setattr(export, "iterate_weights", lossy)
    with pytest.raises(VerificationFailed, match=r"1 missing keys .* transformer\.h\.1\.mlp\.c_proj\.bias"):
        export_run(run)
    assert_nothing_appeared(run)


def test_a_lost_adapter_is_found(make_run: Any, tmp_path: Path) -> None:
    """B back at zero: the folder loads well, and is the base model."""
    run = make_run("lora-fp32-0", tmp_path / "run")

    def forget(module: dict[str, torch.Tensor]) -> None:
        for name, value in module.items():
            if "lora_B" in name:
                value.zero_()

    rewritten(run, forget)
    for kind in ("adapter", "merged"):
        with pytest.raises(VerificationFailed, match="logits differ"):
            export_run(run, kinds=[kind])
    assert_nothing_appeared(run)


def test_another_template_is_found(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("llama-fp32-2", tmp_path / "run", chat_template=TEMPLATE)
    original = companions.copy_tokenizer

    def other(tokenizer: Path, folder: Path) -> None:
        original(tokenizer, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE.replace("role", "name"))

    monkeypatch.setattr(companions, "copy_tokenizer", other)
    with pytest.raises(VerificationFailed, match="chat template is not the one that training used"):
        export_run(run)
    assert_nothing_appeared(run)


def test_a_failed_export_leaves_the_earlier_one(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama-fp32-2", tmp_path / "run")
    (before,) = export_run(run)
    rewritten(run, lambda module: module["model.embed_tokens.weight"].mul_(2.0))
    with pytest.raises(VerificationFailed):
        export_run(run)
    assert ExportedModel.read(run.export / "foretune.json") == before
    assert not list(run.path.glob(".export.*"))


def test_a_damaged_checkpoint_is_not_exported(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama-fp32-3", tmp_path / "run")
    shard = next(checkpoint_of(run).glob("engine/*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for step in (None, 2):
        with pytest.raises(VerificationFailed, match="is damaged"):
            export_run(run, step=step)
    assert_nothing_appeared(run)


# ── what the user can mend ──────────────────────────────────────────────────────────────────────────────────────────


def test_refusals(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("llama-fp32-2", tmp_path / "run")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"to": mine}, "--to"),
        ({"to": mine / "thesis.txt"}, "--to"),
        ({"step": 7}, "--step"),
        ({"kinds": ["merged"]}, "--kind"),
        ({"kinds": []}, "--kind"),
    ]
    for options, field in cases:
        with pytest.raises(UserError) as caught:
            export_run(run, **options)
        assert caught.value.field == field
    assert (mine / "thesis.txt").read_text() == "years of work"
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match="its disk has"):
        export_run(run)
    assert_nothing_appeared(run)


def test_a_checkpoint_within_training_is_refused(make_run: Any, tmp_path: Path) -> None:
    run = make_run("llama-fp32-2", tmp_path / "run")
    (checkpoint_of(run) / "reference.safetensors").unlink()
    _sign(run)
    with pytest.raises(UserError, match="training has not ended") as caught:
        export_run(run)
    assert "Ctrl-C" in caught.value.mend
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UserError, match="no complete checkpoint"):
        export_run(run)


def test_to_another_place(make_run: Any, tmp_path: Path) -> None:
    run = make_run("lora-fp32-0", tmp_path / "run")
    (merged,) = export_run(run, to=tmp_path / "deep" / "down" / "model", kinds=["merged"])
    assert merged.kind == "merged"
    assert (tmp_path / "deep" / "down" / "model" / "merged" / "model.safetensors").is_file()
    assert not run.export.exists()
