"""What is about to be served: is it a model, is it the one that was exported, and what does it say of itself?

folder ──cheap checks, no torch──▶ `check_folder` ──tokenizer, template, limits──▶ `ServedModel`

A folder that foretune exported carries `foretune.json`. What that manifest says (sizes, chat template) must hold, or
the model is refused: a server that renders another template than training did answers badly, and nobody sees why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretune.artifacts import ExportedModel
from foretune.errors import UserError

# Names of export folders say nothing to a client: a run's own folder does.
_NAMELESS = {"export", "merged", "full", "model", "adapter"}

# Counting must not warn that a prompt is too long: the count is what tells, and the client is told.
QUIET = {"verbose": False}


@dataclass(frozen=True)
class ServedModel:
    """The one model behind the door, as the front needs to know it.

    Attributes:
        folder: Hugging Face folder, absolute.
        name: what clients call it.
        tokenizer: transformers' tokenizer; counts the tokens of a prompt as the engine will.
        context_length: most tokens of prompt and answer together; None where the model names no limit.
        vocab_size: rows of the embedding.
        generation: the folder's generation configuration (stop tokens, sampling defaults), as JSON values.
        notes: what a user should be told at the start.
    """

    folder: Path
    name: str
    tokenizer: Any
    context_length: int | None
    vocab_size: int
    generation: Mapping[str, Any]
    notes: Sequence[str] = field(default=())

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def count_chat_tokens(
        self, messages: list[Any], *, tools: list[Any] | None, template_options: Mapping[str, Any]
    ) -> int:
        """Tokens of a rendered conversation, with the opening of the answer.

        Raises:
            jinja2.TemplateError, TypeError, ValueError, KeyError: the template refuses these messages.
        """
        rendered = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True,
            tokenizer_kwargs=QUIET, **template_options,
        )  # fmt: skip
        return len(rendered["input_ids"])

    def count_text_tokens(self, text: str) -> int:
        """Tokens of a plain prompt, special tokens that the tokenizer adds included."""
        return len(self.tokenizer(text, **QUIET)["input_ids"])


def default_name(folder: Path) -> str:
    """What clients call the model if nobody says: the folder's name, or the run's for RUN/export."""
    folder = folder.resolve()
    while folder.name in _NAMELESS and folder.parent.name:
        folder = folder.parent
    return folder.name


def check_folder(folder: Path) -> ExportedModel | None:
    """Refuse what cannot be served, before anything is started. Reads JSON and file sizes only; imports no torch.

    Returns:
        The export's manifest, where there is one.

    Raises:
        UserError: no such folder, no model in it, an adapter without its base, or files that differ from the manifest.
    """
    where = str(folder)
    if not folder.is_dir():
        raise UserError("model", where, "there is no such folder", "give a run, or the folder of an exported model")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                "model", where, "holds an adapter without its base model", "serve the merged export instead"
            )
        raise UserError(
            "model", where, "holds no config.json, so it is no model", "give a run, or the folder of an exported model"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures")
    except (ValueError, AttributeError) as error:
        raise UserError("model", where, f"config.json is damaged ({error})", "export the model again") from None
    if not isinstance(architectures, list) or not architectures:
        raise UserError(
            "model", where, "config.json names no architecture", "save the model with save_pretrained, which writes it"
        )
    path = folder / ExportedModel.file_name
    if not path.is_file():
        return None
    manifest = ExportedModel.read(path)
    for name, expected in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not {expected.bytes}"
            raise UserError("model", where, f"{name} {found}: this is not what was exported", "export the run again")
    return manifest


def read_model(folder: Path, *, name: str | None = None, trust_remote_code: bool = False) -> ServedModel:
    """Load what the front needs to know of a model: tokenizer, limits, stop tokens; never its weights.

    Raises:
        UserError: what `check_folder` refuses; an unreadable tokenizer; another chat template than was exported.
    """
    manifest = check_folder(folder)
    folder = folder.resolve()
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            "model", str(folder), f"its configuration or tokenizer can't be loaded: {reason}", "export the model again"
        ) from error
    _check_template(folder, tokenizer, manifest)
    try:
        generation = GenerationConfig.from_pretrained(str(folder))
    except OSError:  # a folder without generation_config.json: transformers itself falls back the same way
        generation = GenerationConfig.from_model_config(config)
    text_config = config.get_text_config()
    notes = []
    if tokenizer.chat_template is None:
        notes.append("the tokenizer has no chat template: only plain completions are answered, chat is refused")
    if generation.eos_token_id is None:
        notes.append("the model names no stop token: answers end only at their length limit or at a `stop` text")
    return ServedModel(
        folder=folder,
        name=name if name is not None else default_name(folder),
        tokenizer=tokenizer,
        context_length=getattr(text_config, "max_position_embeddings", None),
        vocab_size=int(text_config.vocab_size),
        generation=generation.to_diff_dict(),
        notes=tuple(notes),
    )


def template_sha256(tokenizer: Any) -> str | None:
    """Hash of a tokenizer's chat template (of the default one where it has several); None without a template."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default", json.dumps(dict(template), sort_keys=True))
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def _check_template(folder: Path, tokenizer: Any, manifest: ExportedModel | None) -> None:
    found = template_sha256(tokenizer)
    if manifest is None or manifest.chat_template_sha256 == found:
        return
    if found is None:
        problem = "its chat template is gone"
    elif manifest.chat_template_sha256 is None:
        problem = "it has a chat template, and was trained and exported without one"
    else:
        problem = "its chat template is not the one it was trained with"
    raise UserError(
        "model", str(folder), f"{problem}, so its answers would not be the trained model's",
        "export the run again, or remove foretune.json to serve what is there on your own account",
    )  # fmt: skip
