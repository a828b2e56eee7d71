"""A .gguf file becomes a Hugging Face folder that trains: llama.cpp's packed weights in, plain safetensors out.

    file.gguf ──read metadata──▶ refuse what would come out wrong (damaged, split, scaled rope, unknown text splitting)
              ──transformers──▶ plain weights ──▶ a fresh model (the loaded one can't be saved) ──▶ safetensors
              ──transformers──▶ tokenizer ──mend how it splits text──▶ tokenizer.json, chat template
    folder.partial ──read the tokenizer back, compare──▶ manifest ──rename──▶ folder (existence means complete)

Needs the extra ``gguf``. torch and transformers are imported inside.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from foretune.artifacts import Artifact, sync_folder
from foretune.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

#: Byte-level vocabularies whose digits stand alone: llama.cpp (llama-vocab.cpp) splits ``\p{N}``, then as GPT-2.
DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
#: Byte-level vocabularies that use GPT-2's expression alone, which is what transformers builds when it knows no better.
PLAIN_SPLITTING = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "gigachat", "roberta-bpe"})
#: Tensor that holds one factor per rotary wavelength. It is no weight.
ROPE_FACTORS = "rope_freqs.weight"
#: Text on which a tokenizer read back from disk must agree with the one that was written.
PROBE = "In 1984, Zoë's 12 cats   ate 3.75 kg of fish — naïve?\n\n\tdef f(x):\n    return x+1  # 你好 🙂"


class ConvertedModel(Artifact):
    """What a converted folder was made from; written last."""

    file_name: ClassVar[str] = "foretune-source.json"
    source: str  # name of the .gguf file
    sha256: str
    architecture: str
    parameters: int
    dtype: str


def convert_gguf(file: Path, folder: Path, *, sha256: str = "") -> None:
    """Convert a .gguf file to a Hugging Face folder: config, safetensors, tokenizer, chat template, generation config.

    Weights keep the file's precision where it is plain (F32, F16, BF16); quantised ones are saved as bf16, whose
    rounding (2⁻⁹ relative) is below that of 8-bit blocks. Peak host memory: about twice the saved size.

    Args:
        file: one .gguf file.
        folder: made by this; must not exist. It appears whole or not at all.
        sha256: hex digest of `file`, to be noted in the manifest.

    Raises:
        UserError: the extra is missing, or the file is damaged, split, of an unsupported architecture, or holds
            something that the conversion would lose without a word.
    """
    header = _read_header(file)
    _refuse_losses(file, header)
    dtype = _saved_dtype(header)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        with _quietly():
            model = _load(file, header, dtype)
            parameters = _save_model(model, partial, file=file, header=header)
            _save_tokenizer(file, header.metadata, partial)
        ConvertedModel(
            source=file.name, sha256=sha256, architecture=header.architecture, parameters=parameters, dtype=dtype
        ).write(partial / ConvertedModel.file_name)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / ConvertedModel.file_name).is_file():  # another process was faster: its folder is as good
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _Header:
    """What a file says of itself: metadata (lists of the vocabulary left out) and its table of tensors."""

    metadata: dict[str, Any]
    tensors: list[tuple[str, str, int]]  # name, type ("Q4_1"), number of elements
    rope_factors: list[float]  # wavelengths are stretched by these (Llama 3.1 and later); mostly empty

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata of the architecture, e.g. ``rope.freq_base``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def _read_header(file: Path) -> _Header:
    try:
        import gguf
        import sentencepiece  # noqa: F401 (transformers wants it, and says so only in a traceback)
    except ImportError as error:
        raise UserError(
            "model", str(file), f"a .gguf file needs the package {error.name}", 'pip install "foretune[gguf]"'
        ) from None
    try:
        reader = gguf.GGUFReader(str(file))
        long_lists = ("tokens", "merges", "token_type", "scores")
        metadata = {
            key: field.contents() for key, field in reader.fields.items() if key.rpartition(".")[2] not in long_lists
        }
        tensors = [(tensor.name, tensor.tensor_type.name, int(tensor.n_elements)) for tensor in reader.tensors]
        factors = [tensor.data.tolist() for tensor in reader.tensors if tensor.name == ROPE_FACTORS]
        if "general.architecture" not in metadata or not tensors:
            raise ValueError("it names no architecture or holds no weights")
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, TypeError) as error:
        raise _damaged(file, error) from error
    return _Header(metadata, tensors, factors[0] if factors else [])


def _damaged(file: Path, error: Exception) -> UserError:
    problem = f"can't be read as GGUF ({' '.join(str(error).split())[:200]})"
    return UserError(
        "model",
        str(file),
        problem,
        "the file is damaged or cut short: compare its size with its source and download it again",
    )


def _lossy(file: Path, problem: str) -> UserError:
    return UserError("model", str(file), problem, "use the original Hugging Face folder or hub id of this model")


def _refuse_losses(file: Path, header: _Header) -> None:
    """Refuse what transformers leaves out of a .gguf file without saying so."""
    if int(header.metadata.get("split.count", 1)) > 1:
        mend = "join the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf"
        raise UserError("model", str(file), "is one part of a split .gguf file", mend)
    scaled = header.get("rope.scaling.type", "none") != "none"
    stretched = any(name.startswith("rope_f") for name, _, _ in header.tensors)
    if scaled or (stretched and _llama3_rope(header) is None):
        raise _lossy(file, "uses scaled rotary positions, which the conversion would lose")
    splitting = header.metadata.get("tokenizer.ggml.pre")
    byte_level = header.metadata.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and splitting not in _known_splittings(header.architecture):
        raise _lossy(file, f"its tokenizer splits text in a way unknown here ({splitting!r})")


def _llama3_rope(header: _Header) -> dict[str, Any] | None:
    """Rotary parameters of Llama 3.1 and later, which a file holds only as one factor per wavelength.

    The parameters are guessed (all published models differ in `factor` alone, and that is the largest of the factors)
    and then held against every factor of the file. None if they do not explain them.
    """
    base, size = float(header.get("rope.freq_base", 10_000.0)), 2 * len(header.rope_factors)
    if not size or header.architecture != "llama":
        return None
    low, high, original = 1.0, 4.0, 8192
    factor = max(header.rope_factors)
    for index, stated in enumerate(header.rope_factors):
        wavelength = 2 * math.pi * base ** (2 * index / size)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        if not math.isclose(stated, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            return None
    return {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _known_splittings(architecture: str) -> set[str | None]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as in_transformers
    except ImportError:
        in_transformers = {}
    unnamed: set[str | None] = {None, "default"} if architecture == "gpt2" else set()
    return {*DIGIT_SPLITTING, *PLAIN_SPLITTING, *in_transformers, *unnamed}


def _saved_dtype(header: _Header) -> str:
    """The precision of most weights, if it is a plain one; bf16 for quantised files. (Norms are F32 in every file.)"""
    elements: dict[str, int] = {}
    for _, kind, count in header.tensors:
        elements[kind] = elements.get(kind, 0) + count
    most = max(elements, key=lambda kind: elements[kind])
    return {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")


def _load(file: Path, header: _Header, dtype: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (ValueError, NotImplementedError, KeyError) as error:
        if "support" in str(error) or isinstance(error, NotImplementedError):
            said = " ".join(str(error).split())[:200]
            raise _lossy(file, f"its architecture ({header.architecture}) can't be converted: {said}") from error
        raise _damaged(file, error) from error
    lost = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in sorted(report[kind])]
    if lost:  # transformers would start these from random numbers
        raise _lossy(file, f"{len(lost)} weights don't match the architecture, the first is {lost[0]}")
    window = header.get("attention.sliding_window")
    if window is not None and getattr(model.config, "sliding_window", window) != window:
        raise _lossy(file, f"attends to {window} tokens at a time, which the conversion would lose")
    return model


def _save_model(model: PreTrainedModel, folder: Path, *, file: Path, header: _Header) -> int:
    """Save through a fresh model; returns its number of parameters (tied weights counted once)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    weights: dict[str, torch.Tensor] = model.state_dict()
    broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise _damaged(file, ValueError(f"{len(broken)} tensors hold NaN or infinity, the first is {broken[0]}"))
    values = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    values["architectures"] = [type(model).__name__]
    if header.rope_factors:
        values["rope_parameters"] = _llama3_rope(header)
    config = AutoConfig.for_model(**values)
    config.name_or_path = ""
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    fresh.load_state_dict(weights, assign=True)
    fresh.tie_weights()
    parameters: int = sum(parameter.numel() for parameter in fresh.parameters())
    expected = sum(elements for name, _, elements in header.tensors if name != ROPE_FACTORS)
    if parameters != expected:
        raise _lossy(file, f"holds {expected:,} weights, but the converted model has {parameters:,}")
    metadata = header.metadata
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    fresh.generation_config = GenerationConfig(
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=list(dict.fromkeys(int(end) for end in ends if end is not None)) or None,
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
    fresh.save_pretrained(folder)
    return parameters


def _save_tokenizer(file: Path, metadata: dict[str, Any], folder: Path) -> None:
    """Save the tokenizer with its splitting mended, and prove that what was saved reads back the same."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        loaded = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise _lossy(file, f"its tokenizer can't be converted: {' '.join(str(error).split())[:200]}") from error
    backend = loaded.backend_tokenizer
    if metadata.get("tokenizer.ggml.model") == "gpt2" and metadata.get("tokenizer.ggml.pre") in DIGIT_SPLITTING:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # The generic class keeps tokenizer.json as it is; a model's own class rebuilds its parts and would lose the mend.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=int(metadata.get(f"{metadata['general.architecture']}.context_length", 0)) or None,
        clean_up_tokenization_spaces=False,
        **{name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)},
    )
    tokenizer.save_pretrained(folder)
    _check_tokenizer(tokenizer, folder, adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)))


def _check_tokenizer(written: PreTrainedTokenizerFast, folder: Path, *, adds_bos: bool) -> None:
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(folder)
    ids = written(PROBE)["input_ids"]
    assert read(PROBE)["input_ids"] == ids, "the saved tokenizer reads back differently"
    assert read.chat_template == written.chat_template, "the saved chat template reads back differently"
    assert (ids[0] == written.bos_token_id) == adds_bos, "the converted tokenizer treats BOS unlike the file says"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars and no advice on packed weights while converting; the user sees foretune's own progress.

    One of the bars asks nobody before it draws, so stderr is set aside. Exceptions pass.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_manifest(folder: Path) -> ConvertedModel | None:
    """The manifest of a converted folder; None if the folder is not one, or not a complete one."""
    path = folder / ConvertedModel.file_name
    try:
        return ConvertedModel.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
