"""What is broken when no configuration is given: a tiny model with random weights, and sums to learn. No network."""

from __future__ import annotations

import json
from pathlib import Path

#: A llama of 0.1 million parameters; dropout makes the random states matter.
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attention_dropout": 0.1,
    "tie_word_embeddings": True,
}
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?!:;#+-=/'\n"


def write_subject(folder: Path) -> tuple[Path, Path]:
    """Write the model into ``folder/model`` and the data into ``folder/sums.jsonl``; returns both."""
    model, data = folder / "model", folder / "sums.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"{a} plus {b}?", "answer": f"It is {a + b}."} for a in range(20) for b in range(20)]
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    if not (model / "model.safetensors").is_file():
        _write_model(model)
    return model, data


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *_LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(vocab_size=len(vocabulary), bos_token_id=1, eos_token_id=2, **_SHAPE)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
