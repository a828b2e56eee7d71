"""Tokenizers and model folders for the tests of the data stage: made here, so that no network is needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foretune.config import parse_config
from foretune.config.schema import Config

STORIES = Path(__file__).parents[2] / "models" / "stories260K"
TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = [
    "<|endoftext|>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
#: How GPT-2 cuts a text into words, and how Llama 3 and Qwen do.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "Once upon a time there was a little girl.\n\nShe said: \"Hello!\" and went home.\n",
    "user\nassistant\nsystem\n### User:\nWhat is 2 + 2?\n\n### Assistant:\nIt is 4.\n\n",
    "The answer is   forty two.\n\n\nWell, well.\n- one\n- two\n",
] * 20  # fmt: skip


def byte_level(words: str, eos: str) -> Any:
    """A byte-level BPE tokenizer of some 700 tokens, as GPT-2, Llama 3 and Qwen have them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, additional_special_tokens=SPECIAL
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A function ``(words, eos, template name or None)`` that gives a tokenizer whose padding token is its eos."""

    def make(words: str = "gpt2", eos: str = "<|endoftext|>", template: str | None = None) -> Any:
        if words == "stories":
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(STORIES))
        else:
            tokenizer = byte_level({"gpt2": GPT2_WORDS, "qwen": QWEN_WORDS}[words], eos)
        if template is not None:
            tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        return tokenizer

    return make


@pytest.fixture
def make_model(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Callable[..., Path]:
    """A function that writes a model folder (config.json and tokenizer, no weights): ``prepare`` reads no more."""

    def make(*, vocab_size: int = 1024, context: int = 2048, **tokenizer: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(STORIES, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
        make_tokenizer(**tokenizer).save_pretrained(str(folder))
        config = json.loads((folder / "config.json").read_text())
        config |= {"vocab_size": vocab_size, "max_position_embeddings": context}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """A function ``(data, **keys)`` that gives a configuration; keys are sections."""

    def make(data: object, **keys: object) -> Config:
        return parse_config({"model": "unused", "data": data, **keys})

    return make


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    """A function ``(rows, name)`` that writes JSON lines."""
    return lambda rows, name="rows.jsonl": write_rows(tmp_path / name, rows)
