"""Whatever a user can get wrong ends in one clear error: exit code, field, mend, and never a traceback.

Each case runs the real command in a process and a folder of its own, without network; a few of them (`FRESH`) in a fresh
one, the others in forks of one that has imported everything. To add one: a line in `CASES`, and a function that lays out
its files if it needs any.
"""
# ruff: noqa: E501 (a table is read across)

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from warm_commands import RunCommand, warm_commands

MODEL = Path(__file__).parents[1] / "models" / "stories260K"
WITHOUT_JSON = ("serve", "chat")


@dataclass(frozen=True)
class Mistake:
    """A command line in which ``{model}`` and ``{data}`` are good ones, and what must be said about it."""

    name: str
    words: str
    field: str
    problem: str  # part of it
    mend: str  # part of it
    files: Callable[[Path], None] | None = None
    code: int = 2


# ── files that cases need, each written into the case's folder ──────────────────────────────────────────────────────


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def rows(name: str, *values: dict[str, Any]) -> Callable[[Path], None]:
    return text(name, "".join(json.dumps(value) + "\n" for value in values))


def model(without: str = "", **config: Any) -> Callable[[Path], None]:
    """A copy of the test model as ``m``, without some of its files, and with other keys in its config.json."""

    def write(folder: Path) -> None:
        shutil.copytree(MODEL, folder / "m", ignore=shutil.ignore_patterns(*without.split()))
        if config:
            path = folder / "m" / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))

    return write


def broken_weights(folder: Path) -> None:
    model()(folder)
    weights = folder / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def small_vocabulary(folder: Path) -> None:
    """A model whose embedding has fewer rows than its tokenizer has tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model()(folder)
    config = AutoConfig.from_pretrained(folder / "m")
    config.vocab_size = 300
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "m")


def begun_run(folder: Path) -> None:
    """A run folder ``r`` that has a checkpoint (of which only the name is looked at)."""
    text("r/config.yaml", "model: other\ndata: other.jsonl\n")(folder)
    (folder / "r" / "checkpoints" / "step-00000010").mkdir(parents=True)


def run_without_checkpoint(folder: Path) -> None:
    text("r/config.yaml", "model: m\ndata: d.jsonl\n")(folder)


def other_things(folder: Path) -> None:
    text("r/thesis.tex", "mine")(folder)


CASES = [
    # ── the command line ──
    Mistake("unknown verb", "trian --model {model}", "verb", "no such verb", "did you mean train?"),
    Mistake("unknown option", "run --modle {model} --data {data}", "--modle", "no such option", "did you mean --model?"),
    Mistake("option without value", "run --model", "--model", "needs a value", "foretune run -h"),
    Mistake("too many words", "train a.yaml b.yaml", "command line", "unexpected extra argument", "foretune train -h"),
    Mistake("a word for a number", "run --model {model} --data {data} --epochs many", "--epochs", "valid number", "run -h"),
    Mistake("no run named", "export", "RUN", "is required", "foretune export -h"),
    Mistake("no ranks", "run --model {model} --data {data} --nproc 0", "--nproc", "not a number of ranks", "1 or more"),
    Mistake("set without =", "run --model {model} --data {data} --set train.epochs", "--set", "key=value", "--set train.epochs=2"),
    # ── the configuration ──
    Mistake("no such configuration", "run none.yaml", "CONFIG", "no such file", "check the path"),
    Mistake("not YAML", "run c.yaml", "CONFIG", "is not YAML", "mend the named line", text("c.yaml", "model: [gpt2\ndata: x")),
    Mistake("binary configuration", "run c.yaml", "CONFIG", "is not YAML", "mend", text("c.yaml", b"\xff\xfe\x00")),
    Mistake("a key twice", "run c.yaml", "CONFIG", "'model' is given twice", "mend", text("c.yaml", "model: a\nmodel: b\n")),
    Mistake("no keys", "run c.yaml", "CONFIG", "holds no keys", "model: gpt2", text("c.yaml", "- gpt2\n- data.jsonl\n")),
    Mistake("no model", "run --data {data}", "model", "is required", "--model"),
    Mistake("no data", "run --model {model}", "data", "is required", "--data"),
    Mistake("misspelt key", "run --model {model} --data {data} --set train.learning_rat=1e-5", "train.learning_rat", "no such key",
            "did you mean train.learning_rate?"),
    Mistake("misspelt section", "run --model {model} --data {data} --set trian.epochs=1", "trian", "no such key", "did you mean train"),
    Mistake("key in the wrong section", "run --model {model} --data {data} --set plan.learning_rate=1e-5", "plan.learning_rate",
            "no such key", "did you mean train.learning_rate?"),
    Mistake("wrong type", "run --model {model} --data {data} --set train.max_steps=ten", "train.max_steps", "integer", "set train.max_steps"),
    Mistake("negative learning rate", "run --model {model} --data {data} --set train.learning_rate=-1", "train.learning_rate",
            "greater than 0", "set train.learning_rate"),
    Mistake("unknown method", "run --model {model} --data {data} --method qlora", "method", "'full' or 'lora'", "set method"),
    Mistake("a key below a value", "run --model {model} --data {data} --set method.r=4", "method", "should be 'full' or 'lora'", "set method"),
    # ── the data ──
    Mistake("no such data", "run --model {model} --data none.jsonl", "data.sources[0].path", "no such file", "check the path"),
    Mistake("empty file", "run --model {model} --data e.jsonl", "data.sources[0].path", "no rows", "", text("e.jsonl", "")),
    Mistake("broken line", "run --model {model} --data b.jsonl", "data.sources[0].path", "is not JSON", "mend that line",
            text("b.jsonl", '{"text": "a good line"}\n{"text": "torn\n')),
    Mistake("not UTF-8", "run --model {model} --data u.jsonl", "data.sources[0].path", "UTF-8", "save the file as UTF-8",
            text("u.jsonl", '{"text": "Käse"}\n'.encode("latin-1"))),
    Mistake("unknown columns", "run --model {model} --data c.jsonl", "data.sources[0].path", "bar, foo", "question_answer: question, answer",
            rows("c.jsonl", {"foo": "a", "bar": "b"})),
    Mistake("wrong format", "run --model {model} --data {data} --set data.format=messages", "data.sources[0].path", "not of the form",
            "set the format"),
    Mistake("unknown format", "run --model {model} --data {data} --set data.format=chatml", "data.format", "'messages'", "set data.format"),
    Mistake("preferences", "run --model {model} --data p.jsonl", "data.sources[0].path", "preferences", "preferred answers",
            rows("p.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})),
    Mistake("nothing to learn", "run --model {model} --data q.jsonl", "data", "", "look at the rows",
            rows("q.jsonl", *({"question": f"why {index}?", "answer": ""} for index in range(20)))),
    Mistake("pattern without files", "run --model {model} --data none/*.jsonl", "data.sources[0].path", "matches no file", "check the pattern"),
    Mistake("folder without data", "run --model {model} --data d", "data.sources[0].path", "without data files", ".jsonl", text("d/readme", "x")),
    Mistake("unknown kind of file", "run --model {model} --data t.xlsx", "data.sources[0].path", "not known", ".jsonl", text("t.xlsx", "x")),
    Mistake("no chat template there", "run --model {model} --data {data} --set data.chat_template=none.jinja", "data.chat_template",
            "no such file", "Jinja"),
    # ── the model ──
    Mistake("no such model", "run --model ./none --data {data}", "model", "no such folder", "check the path"),
    Mistake("hub model without network", "run --model org/none --data {data}", "model", "the hub", "give a local folder"),
    Mistake("a file for a model", "run --model {model}/config.json --data {data}", "model", "no .gguf file", "give its folder"),
    Mistake("folder without config.json", "run --model m --data {data}", "model", "no config.json", "save_pretrained", model("config.json")),
    Mistake("config.json that is no JSON", "run --model m --data {data}", "model", "is not JSON", "download the model again",
            lambda folder: (model()(folder), text("m/config.json", "{")(folder))[1]),
    Mistake("model without tokenizer", "run --model m --data {data}", "model", "no tokenizer", "", model("tokenizer*")),
    Mistake("model without weights", "run --model m --data {data}", "model", "no weights", "--from-scratch", model("*.safetensors")),
    Mistake("torn weights", "run --model m --data {data}", "model", "model.safetensors is torn", "again", broken_weights),
    Mistake("vocabulary larger than embedding", "run --model m --data {data}", "model", "300", "", small_vocabulary),
    Mistake("model that needs its own code", "run --model m --data {data}", "trust_remote_code", "its own Python code", "--trust-remote-code",
            model(model_type="strange", architectures=["StrangeForCausalLM"], auto_map={"AutoConfig": "strange.C"})),
    Mistake("model that reads only", "run --model m --data {data}", "model", "", "",
            model(model_type="bert", architectures=["BertForMaskedLM"])),
    Mistake("a run for a model", "run --model r --data {data}", "model", "is a run", "export", run_without_checkpoint),
    Mistake("rows longer than the context", "run --model {model} --data {data} --set train.max_length=100000", "train.max_length", "512",
            "at most 512"),
    # ── the plan ──
    Mistake("no hardware", "plan --model {model} --hardware=", "--hardware", "not a description", "8xH100-80GB"),
    Mistake("unknown accelerator", "plan --model {model} --hardware 8xH1000", "--hardware", "no accelerator", "did you mean H100"),
    Mistake("unknown hardware option", "plan --model {model} --hardware 1xL4,rma=8GB", "--hardware", "rma", "ram"),
    Mistake("ranks said twice", "plan --model {model} --hardware 1xL4 --nproc 2", "--nproc", "--hardware", "into --hardware"),
    Mistake("fp16 on a CPU", "plan --model {model} --hardware 2xcpu --set train.precision=fp16", "train.precision", "fp16", "fp32"),
    Mistake("bf16 where there is none", "plan --model {model} --hardware 1xV100-16GB --set train.precision=bf16", "train.precision",
            "no bf16", "fp16"),
    Mistake("offload that its stage lacks", "plan --model {model} --hardware 1xL4 --set plan.zero_stage=2 --set plan.offload_param=true",
            "plan.offload_param", "ZeRO-2", "plan.zero_stage to 3"),
    Mistake("more layers than there are", "plan --model {model} --hardware 1xL4 --set plan.checkpointed_layers=99",
            "plan.checkpointed_layers", "5 layers", "at most 5"),
    Mistake("batch that does not come together", "plan --model {model} --hardware 2xL4 --set train.global_batch_size=64 "
            "--set plan.micro_batch_size_per_gpu=1 --set plan.gradient_accumulation_steps=2", "plan.gradient_accumulation_steps",
            "64 rows", "use 32"),
    Mistake("adapters on layers that are none", "plan --model {model} --hardware 1xL4 --method lora --set lora.target_modules=[qkv]",
            "lora.target_modules", "no linear layer", "q_proj"),
    Mistake("pin that cannot fit", "plan --model meta-llama/Llama-3.1-8B --hardware 2xL4 --set plan.zero_stage=1", "plan.zero_stage", "GiB", ""),
    Mistake("nothing fits", "plan --model meta-llama/Llama-3.1-70B --hardware 1xT4,ram=16GB", "plan", "no plan fits", "", code=3),
    Mistake("DeepSpeed's JSON to nowhere", "plan --model {model} --deepspeed-config none/ds.json", "--deepspeed-config", "can't be written",
            "folder"),
    # ── the run folder ──
    Mistake("--out is a file", "run --model {model} --data {data} --out f", "--out", "is a file", "give a folder", text("f", "mine")),
    Mistake("--out holds other things", "run --model {model} --data {data} --out r", "--out", "holds no run", "give a new folder", other_things),
    Mistake("--out cannot be made", "run --model {model} --data {data} --out /proc/none/r", "--out", "", "give an --out"),
    Mistake("--out of another configuration", "run --model {model} --data {data} --out r", "--out", "model was 'other'", "another --out",
            begun_run),
    # ── after training ──
    Mistake("export of no run", "export {model}", "RUN", "no run folder", "foretune run"),
    Mistake("export before training", "export r", "RUN", "no checkpoint", "foretune train", run_without_checkpoint),
    Mistake("evaluation before training", "evaluate r", "RUN", "no checkpoint", "foretune train", run_without_checkpoint),
    Mistake("evaluation of a model on nothing", "evaluate {model}", "--data", "is required", "--data FILE"),
    Mistake("evaluation of nothing", "evaluate ./none --data {data}", "model", "no such folder", "check the path"),
    Mistake("serving before export", "serve r", "RUN", "no export", "foretune export r", run_without_checkpoint),
    Mistake("serving to everybody", "serve {model} --host 0.0.0.0", "--api-key", "", "--api-key"),
    Mistake("unknown engine", "serve {model} --engine vlmm", "--engine", "", ""),
    Mistake("taken port", "serve {model} --port {port}", "--port", "", "--port"),
    Mistake("chat with nobody", "chat ./none", "model", "no such folder", "check the path"),
]  # fmt: skip
#: Of each kind one whose process is fresh: what is imported late shows there.
FRESH = ("unknown verb", "not YAML", "broken line", "torn weights", "unknown accelerator", "--out is a file", "export before training",
         "unknown engine")  # fmt: skip


@pytest.fixture(scope="module")
def warm() -> Iterator[RunCommand]:
    with warm_commands() as run:
        yield run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file of examples."""
    path = tmp_path_factory.mktemp("data") / "good.jsonl"
    rows(path.name, *({"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(50)))(
        path.parent
    )
    return path


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def run_command(words: list[str], folder: Path, warm: RunCommand | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    if warm is not None:
        return warm(words, folder=folder, environment=environment, timeout=120)
    command = [sys.executable, "-m", "foretune", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def said(done: subprocess.CompletedProcess[str], words: list[str]) -> list[tuple[str, str, str]]:
    """(field, problem, mend) of every fault: from the JSON where the verb writes it, else from stderr."""
    if words[0] in WITHOUT_JSON:
        found = re.findall(r"^error: (\S+?)(?: = .*?)?: (.*)\n  mend: (.*)$", done.stderr, re.MULTILINE)
        return [(field, problem, mend) for field, problem, mend in found]
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == done.returncode
    return [(fault["field"], fault["problem"], fault["mend"]) for fault in error.get("faults", [error])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mistake(case: Mistake, tmp_path: Path, data: Path, warm: RunCommand) -> None:
    if case.files is not None:
        case.files(tmp_path)
    with ExitStack() as stack:
        port = stack.enter_context(taken_port()) if "{port}" in case.words else 0
        words = [word.format(model=MODEL, data=data, port=port) for word in case.words.split()]
        json_wanted = [] if words[0] in WITHOUT_JSON or (len(words) == 2 and words[-1] == "--model") else ["--json"]
        done = run_command(words + json_wanted, tmp_path, None if case.name in FRESH else warm)
    assert done.returncode == case.code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" not in done.stdout
    assert ("what would fit:" if case.code == 3 else "mend:") in done.stderr
    faults = said(done, words) if json_wanted or words[0] in WITHOUT_JSON else said(done, ["serve"])
    told = [fault for fault in faults if fault[0] == case.field]
    assert told, faults
    _, problem, mend = told[0]
    assert case.problem in problem
    assert case.mend in mend
    assert mend.strip()


def test_a_full_disk(tmp_path: Path, data: Path, warm: RunCommand) -> None:
    """A file system of one megabyte stands for a disk that is almost full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    try:
        done = run_command(
            ["train", "--model", str(MODEL), "--data", str(data), "--out", str(disk / "r"), "--json"], tmp_path, warm
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode == 2, done.stderr
    (field, problem, mend), *_ = said(done, ["train"])
    assert field == "--out"
    assert "free" in problem or "no space" in problem
    assert "free some" in mend


def test_the_table_is_long_enough_and_names_each_case_once() -> None:
    names = {case.name for case in CASES}
    assert len(names) == len(CASES) >= 30
    assert names >= set(FRESH)
