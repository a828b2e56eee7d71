"""The stage as a whole: what it keeps, drops, counts and says; what it reuses; what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foretune.artifacts import IGNORE_INDEX, PreparedDataset
from foretune.config.schema import Config
from foretune.data import open_loader, readers
from foretune.data.loader import DocumentStore
from foretune.data.packing import PackIndex
from foretune.data.prepare import prepare
from foretune.errors import UserError

STORIES = Path(__file__).parents[2] / "models" / "stories260K"
SHARED = Path(__file__).parents[4] / "shared" / "data"
MakeConfig = Callable[..., Config]
RowsFile = Callable[..., Path]
MakeModel = Callable[..., Path]


def chat_rows(number: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(number)]


def text_rows(number: int) -> list[dict[str, str]]:
    return [{"text": f"Once upon a time there were {i} cats. " * (1 + i % 5)} for i in range(number)]


class Prepared:
    """A prepared folder, read back piece by piece."""

    def __init__(self, folder: Path) -> None:
        self.manifest = PreparedDataset.read(folder / "manifest.json")
        self.index = PackIndex.load(folder / "packs.npz")
        self.store = DocumentStore(folder / "documents")

    def piece(self, piece: int) -> tuple[list[int], list[int]]:
        index = self.index
        place = int(index.documents[piece]), int(index.starts[piece]), int(index.stops[piece])
        ids, labels = self.store.read(*place)
        return ids.tolist(), labels.tolist()

    def document(self, document: int) -> list[int]:
        """All tokens of a stored document."""
        return self.store.read(document, 0, int(self.store.lengths()[document]))[0].tolist()

    def pieces(self) -> list[tuple[list[int], list[int]]]:
        return [self.piece(piece) for piece in range(self.index.documents.size)]


def run(
    config: Config, out: Path, *, model: Path = STORIES, said: list[str] | None = None
) -> tuple[PreparedDataset, Prepared]:
    manifest = prepare(config, model_folder=model, out=out, on_progress=(said if said is not None else []).append)
    return manifest, Prepared(out)


# ── what is kept, dropped and counted ───────────────────────────────────────────────────────────────────────────────


def test_the_summary_adds_up(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    rows: list[Any] = [*chat_rows(40), chat_rows(1)[0], {"question": "q", "answer": ""}, {"question": "q"}, 7]
    said: list[str] = []
    manifest, prepared = run(make_config(str(rows_file(rows))), tmp_path / "out", said=said)
    assert manifest == prepared.manifest
    assert manifest.rows_read == 44
    assert manifest.documents + manifest.validation_documents == 40
    assert manifest.validation_documents == 1
    assert manifest.duplicates == 1
    assert manifest.dropped == {"empty answer": 1, "no answer": 1, "row is not an object": 1}
    assert manifest.rows_read == 40 + manifest.duplicates + sum(manifest.dropped.values())
    assert manifest.sources[0].columns == ["answer", "question"]
    assert manifest.sources[0].format == "question_answer"
    assert any("form question_answer (columns answer, question)" in line for line in said)
    index = prepared.index
    assert manifest.tokens == sum(len(prepared.piece(piece)[0]) for piece in index.pack_pieces.tolist())
    assert manifest.target_tokens == sum(
        label != IGNORE_INDEX for piece in index.pack_pieces.tolist() for label in prepared.piece(piece)[1][1:]
    )
    assert manifest.packs == index.pack_offsets.size - 1
    assert manifest.fill == pytest.approx(manifest.tokens / (manifest.packs * manifest.max_length))
    assert manifest.longest_document == max(len(ids) for ids, _ in prepared.pieces())
    assert not list(tmp_path.glob(".out*")), "nothing is left beside the folder"
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [
        "documents", "manifest.json", "packs.npz", "tokenizer"
    ]  # fmt: skip


def test_three_samples_show_what_is_learned(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    manifest, _ = run(make_config(str(rows_file(chat_rows(30)))), tmp_path / "out")
    assert len(manifest.samples) == 3
    (prompt, learned), (answer, is_target) = manifest.samples[0].pieces
    assert (learned, is_target) == (False, True)
    assert prompt.endswith("### Assistant:\n")
    assert answer.startswith("It is ")
    assert answer.endswith(".</s>")
    assert 0 < manifest.samples[0].target_tokens < manifest.samples[0].tokens


def test_texts_begin_and_end_as_the_tokenizer_says(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile
) -> None:
    manifest, prepared = run(make_config(str(rows_file(text_rows(20)))), tmp_path / "out")
    assert manifest.chat_template == "none"
    assert manifest.pad_token_id == manifest.eos_token_id == 2
    for ids, labels in prepared.pieces():
        assert ids[0] == 1, "the beginning of sequence, which this tokenizer writes by itself"
        assert ids[-1] == labels[-1] == 2, "the end of sequence is a target although it is the padding token"
        assert ids == labels
        assert ids.count(2) == 1


def test_long_texts_are_split_so_that_every_token_is_learned_once(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile
) -> None:
    rows = [{"text": "Once upon a time there was a cat. " * 40}, *text_rows(12)]
    config = make_config(str(rows_file(rows)), train={"max_length": 64}, evaluate={"validation": 0.0})
    manifest, prepared = run(config, tmp_path / "out")
    assert manifest.split_documents == 3  # and those of text_rows that are repeated four times
    assert manifest.truncated_documents == 0
    index = prepared.index
    for document in np.unique(index.documents).tolist():
        parts = [piece for piece in range(index.documents.size) if index.documents[piece] == document]
        whole = prepared.document(document)
        assert all(2 <= len(prepared.piece(piece)[0]) <= 64 for piece in parts)
        learned = [token for piece in parts for token in prepared.piece(piece)[0][1:]]
        assert learned == whole[1:]
        assert learned[-1] == manifest.eos_token_id
        assert sum(token == manifest.eos_token_id for token in learned) == 1


def test_long_conversations_are_truncated_and_counted(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile
) -> None:
    rows = [
        *chat_rows(20),
        {"question": "A story?", "answer": "Once upon a time. " * 40},
        {"question": "Why? " * 60, "answer": "So."},
    ]
    config = make_config(str(rows_file(rows)), train={"max_length": 64})
    manifest, prepared = run(config, tmp_path / "out")
    assert manifest.truncated_documents == 1
    assert manifest.dropped == {"no target token left within max_length": 1}
    assert max(len(ids) for ids, _ in prepared.pieces()) == 64
    whole = len(prepared.document(20))
    assert manifest.truncated_tokens == whole - 64
    assert all(any(label != IGNORE_INDEX for label in labels[1:]) for _, labels in prepared.pieces())


def test_duplicates_stay_where_asked_for(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    data = {"path": str(rows_file(chat_rows(10) * 2)), "deduplicate": False}
    manifest, _ = run(make_config(data), tmp_path / "out")
    assert manifest.documents + manifest.validation_documents == 20
    assert manifest.duplicates == 0


def test_train_on_prompt(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    data = {"path": str(rows_file(chat_rows(10))), "train_on_prompt": True}
    _, prepared = run(make_config(data), tmp_path / "out")
    assert all(ids == labels for ids, labels in prepared.pieces())


def test_sources_of_several_forms_and_kinds(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    (tmp_path / "mix").mkdir()
    rows_file(chat_rows(15), "mix/a.jsonl")
    rows_file([{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(15)], "mix/b.jsonl")
    (tmp_path / "c.csv").write_text("text\n" + "".join(f"a story of {i}\n" for i in range(15)))
    config = make_config([str(tmp_path / "mix"), str(tmp_path / "c.csv")], evaluate={"validation": 0.0})
    manifest, prepared = run(config, tmp_path / "out")
    assert [source.format for source in manifest.sources] == ["prompt_completion + question_answer", "text"]
    assert [source.documents for source in manifest.sources] == [30, 15]
    assert manifest.documents == prepared.index.pack_pieces.size == 45
    assert sum(ids == labels for ids, labels in prepared.pieces()) == 15, "texts are learned whole"


def test_weights_repeat_and_thin_out(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    data = [
        {"path": str(rows_file([{"text": f"one {i}"} for i in range(20)], "a.jsonl")), "weight": 2.5},
        {"path": str(rows_file([{"text": f"two {i}"} for i in range(20)], "b.jsonl")), "weight": 0.25},
    ]
    manifest, prepared = run(make_config(data, evaluate={"validation": 0.0}), tmp_path / "out")
    assert manifest.documents == 40
    repeats = np.bincount(prepared.index.pack_pieces, minlength=40)
    assert sorted(repeats[:20].tolist()) == [2] * 10 + [3] * 10
    assert sorted(repeats[20:].tolist()) == [0] * 15 + [1] * 5


@pytest.mark.parametrize(
    ("longest", "context", "length", "reason"),
    [
        (20, 2048, 128, "smallest power of two"),
        (150, 2048, 256, "smallest power of two"),
        (150, 100, 100, "the model's context; longer conversations are truncated"),
        (6000, 32768, 4096, "longer conversations are truncated"),
    ],
)
def test_the_row_length_is_decided_and_explained(  # noqa: PLR0917
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile, make_model: MakeModel,
    longest: int, context: int, length: int, reason: str,
) -> None:  # fmt: skip
    model = make_model(words="gpt2", context=context)
    rows = [*chat_rows(3), {"question": "q", "answer": "\u00e9" * (longest // 2)}]  # two tokens a letter, unmerged
    manifest, _ = run(make_config(str(rows_file(rows))), tmp_path / "out", model=model)
    assert manifest.max_length == length
    assert reason in manifest.max_length_reason


# ── plain text files ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_file_is_one_document_and_its_end_is_held_out(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "a.txt").write_text("".join(f"Line {i} of a long story.\n" for i in range(900)))
    config = make_config(str(tmp_path / "a.txt"), evaluate={"validation": 0.1})
    manifest, prepared = run(config, tmp_path / "out")
    assert (manifest.rows_read, manifest.documents, manifest.split_documents) == (1, 1, 1)
    held_out, trained = prepared.index.validation_pieces, prepared.index.pack_pieces
    assert held_out.size == round(0.1 * (held_out.size + trained.size))
    assert prepared.index.starts[held_out].min() > prepared.index.starts[trained].max()
    assert any("ends of the texts" in note for note in manifest.notes)


@pytest.mark.parametrize("words", ["gpt2", "qwen", "stories"])
def test_a_text_file_read_in_parts_gives_the_same_tokens(
    tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    model = make_model(words=words)
    (tmp_path / "a.txt").write_text("".join(f"Line {i} of a story\nand more\n\n" for i in range(300)))
    config = make_config(str(tmp_path / "a.txt"), evaluate={"validation": 0.0})
    whole, one = run(config, tmp_path / "one", model=model)
    monkeypatch.setattr(readers, "PART_CHARACTERS", 700)
    parted, many = run(config, tmp_path / "many", model=model)
    assert len(many.store) > 5
    assert len(one.store) == 1
    joined = [token for i in range(len(many.store)) for token in many.document(i)]
    assert joined == one.document(0)
    assert (parted.documents, parted.rows_read, parted.longest_document) == (1, 1, whole.longest_document)


# ── the held-out share ──────────────────────────────────────────────────────────────────────────────────────────────


def held_out_of(prepared: Prepared) -> set[tuple[int, ...]]:
    return {tuple(prepared.piece(piece)[0]) for piece in prepared.index.validation_pieces.tolist()}


def test_the_held_out_share_depends_on_the_seed_and_not_on_the_order(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile
) -> None:
    rows, options = chat_rows(60), {"evaluate": {"validation": 0.2}}
    _, first = run(make_config(str(rows_file(rows)), **options), tmp_path / "1")
    _, turned = run(make_config(str(rows_file(rows[::-1], "turned.jsonl")), **options), tmp_path / "2")
    _, other = run(make_config(str(rows_file(rows)), train={"seed": 1}, **options), tmp_path / "3")
    assert len(held_out_of(first)) == 12
    assert held_out_of(first) == held_out_of(turned)
    assert held_out_of(first) != held_out_of(other)
    trained = {tuple(first.piece(piece)[0]) for piece in first.index.pack_pieces.tolist()}
    assert len(trained) == 48
    assert not trained & held_out_of(first)


@pytest.mark.parametrize(("rows", "share", "number"), [(9, 0.5, 0), (10, 0.01, 1), (50, 0.0, 0), (20, 1.0, 19)])
def test_how_many_are_held_out(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile, *, rows: int, share: float, number: int
) -> None:  # fmt: skip
    manifest, _ = run(make_config(str(rows_file(chat_rows(rows))), evaluate={"validation": share}), tmp_path / "out")
    assert manifest.validation_documents == number
    assert manifest.documents == rows - number
    assert any("too few" in note for note in manifest.notes) is (rows == 9)


# ── reuse ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_inputs_are_reused_and_give_the_same_files(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile
) -> None:
    config = make_config(str(rows_file(chat_rows(30))))
    manifest, first = run(config, tmp_path / "out")
    before = (tmp_path / "out" / "packs.npz").stat().st_mtime_ns
    said: list[str] = []
    assert run(config, tmp_path / "out", said=said)[0] == manifest
    assert (tmp_path / "out" / "packs.npz").stat().st_mtime_ns == before
    assert len(said) == 1
    assert said[0].startswith("prepared data is reused")
    _, second = run(config, tmp_path / "other")
    assert first.pieces() == second.pieces()
    assert first.index.pack_pieces.tolist() == second.index.pack_pieces.tolist()
    assert manifest.fingerprint == second.manifest.fingerprint


def test_what_changed_is_named(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile, make_model: MakeModel
) -> None:
    file, model = rows_file(chat_rows(30)), make_model(words="stories", vocab_size=512)

    def why(config: Config) -> str:
        said: list[str] = []
        run(config, tmp_path / "out", model=model, said=said)
        return said[0]

    plain = make_config(str(file))
    assert not why(plain).startswith("preparing again")
    assert "changed since then: data.system" in why(make_config({"path": str(file), "system": "be brief"}))
    assert "train.max_length, train.seed" in why(
        make_config({"path": str(file), "system": "be brief"}, train={"seed": 1, "max_length": 256})
    )
    assert "train.seed" in why(plain)
    rows_file(chat_rows(31))
    assert f"source 0 ({file})" in why(plain)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    assert why(plain) == "preparing again: changed since then: tokenizer"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    assert "model's vocabulary" in why(plain)
    assert why(plain).startswith("prepared data is reused")
    assert why(make_config({"path": str(file), "packing": False, "num_proc": 1})).startswith("prepared data is reused")


def test_a_folder_that_is_not_whole_is_made_again(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    config = make_config(str(rows_file(chat_rows(30))))
    whole, _ = run(config, tmp_path / "out")
    for damage in ("manifest.json", "packs.npz", "documents"):
        path = tmp_path / "out" / damage
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run(config, tmp_path / "out")[0].fingerprint == whole.fingerprint
        assert path.exists()
    (tmp_path / "out" / "manifest.json").write_text("{")
    said: list[str] = []
    run(config, tmp_path / "out", said=said)
    assert "damaged" in said[0]


def test_a_failure_leaves_what_was_there(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    manifest, _ = run(make_config(str(rows_file(chat_rows(30)))), tmp_path / "out")
    with pytest.raises(UserError):
        run(make_config(str(rows_file([{"question": "q", "answer": ""}], "bad.jsonl"))), tmp_path / "out")
    assert PreparedDataset.read(tmp_path / "out" / "manifest.json") == manifest
    assert not list(tmp_path.glob(".out*"))


def test_what_a_killed_process_left_is_removed(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    left = tmp_path / ".out.999999999.partial"
    in_use = tmp_path / f".out.{os.getppid()}.partial"
    left.mkdir()
    in_use.mkdir()
    run(make_config(str(rows_file(chat_rows(3)))), tmp_path / "out")
    assert not left.exists()
    assert in_use.exists()


def test_processes_give_what_one_gives(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    file = str(rows_file([*chat_rows(50), {"question": "q", "answer": ""}]))
    said: list[str] = []
    _, one = run(make_config({"path": file, "num_proc": 1}), tmp_path / "1")
    _, two = run(make_config({"path": file, "num_proc": 2}), tmp_path / "2", said=said)
    assert any("in 2 processes" in line for line in said)
    assert one.pieces() == two.pieces()
    assert one.index.pack_pieces.tolist() == two.index.pack_pieces.tolist()
    assert one.manifest.dropped == two.manifest.dropped


def test_the_saved_tokenizer_has_the_template_that_was_used(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile
) -> None:
    from transformers import AutoTokenizer

    manifest, prepared = run(make_config(str(rows_file(chat_rows(12)))), tmp_path / "out")
    assert manifest.chat_template == "fallback"
    assert any("no chat template" in note for note in manifest.notes)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out" / "tokenizer"))
    messages = [{"role": "user", "content": "What is 0 and 0?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    documents = [prepared.document(i) for i in range(len(prepared.store))]
    assert documents[0][: len(prompt)] == prompt
    assert manifest.stop_token_ids == [2]


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(config: Config, out: Path, model: Path = STORIES) -> UserError:
    with pytest.raises(UserError) as error:
        prepare(config, model_folder=model, out=out)
    assert error.value.mend
    assert not out.exists()
    return error.value


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_broken_line_is_named(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile, num_proc: int
) -> None:  # fmt: skip
    file = rows_file(chat_rows(30))
    lines = file.read_text().splitlines()
    lines[20] = lines[20][:-4]
    file.write_text("\n".join(lines))
    error = refusal(make_config({"path": str(file), "num_proc": num_proc}), tmp_path / "out")
    assert error.field == "data.sources[0].path"
    assert str(error.value).endswith("rows.jsonl:21")


def test_broken_unicode_is_dropped_and_counted(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    file = rows_file(chat_rows(5))
    broken = '{"question": "half \\ud83d a pair", "answer": "b"}\n{"question": "whole \\ud83d\\ude00", "answer": "c"}\n'
    file.write_text(file.read_text() + broken)
    manifest, _ = run(make_config(str(file)), tmp_path / "out")
    assert manifest.dropped == {"broken Unicode (half a surrogate pair)": 1}
    assert manifest.documents == 6


def test_reasons_that_name_their_row_are_not_listed_without_end(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile
) -> None:
    odd = [{"messages": [{"role": f"role {i}", "content": "a"}]} for i in range(40)]
    good = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    manifest, _ = run(make_config(str(rows_file(odd + good))), tmp_path / "out")
    assert len(manifest.dropped) == 21
    assert manifest.dropped["other reasons"] == 20
    assert sum(manifest.dropped.values()) == 40


def test_nothing_left_is_refused_with_the_reasons(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    error = refusal(make_config(str(rows_file([{"question": "q", "answer": ""}] * 3))), tmp_path / "out")
    assert error.field == "data"
    assert "its 3 rows (3 x empty answer)" in error.problem
    long = [{"question": "why? " * 99, "answer": "so"}]
    config = make_config(str(rows_file(long)), train={"max_length": 32})
    assert "no target token left" in refusal(config, tmp_path / "out").problem


def test_models_that_can_t_be_used(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile, make_model: MakeModel
) -> None:
    config = make_config(str(rows_file(chat_rows(3))))
    model = make_model(words="gpt2", vocab_size=100)
    error = refusal(config, tmp_path / "out", model)
    assert error.field == "model"
    assert "its embedding has 100 rows" in error.problem
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for key in ("eos_token", "pad_token"):
        settings.pop(key)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no end-of-sequence token" in refusal(config, tmp_path / "out", model).problem
    (model / "tokenizer.json").write_text("{")
    assert "can't be loaded" in refusal(config, tmp_path / "out", model).problem
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(config, tmp_path / "out", model).problem


@pytest.mark.parametrize("length", [1, 513])
def test_row_lengths_that_can_t_be(
    tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile, length: int
) -> None:  # fmt: skip
    config = make_config(str(rows_file(chat_rows(3))), train={"max_length": length})
    assert refusal(config, tmp_path / "out").field == "train.max_length"


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path, make_config: MakeConfig, rows_file: RowsFile) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds other things") as error:
        run(make_config(str(rows_file(chat_rows(3)))), tmp_path / "out")
    assert error.value.field == "--out"
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_a_plain_text_of_another_form_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "a.txt").write_text("hello")
    error = refusal(make_config({"path": str(tmp_path / "a.txt"), "format": "messages"}), tmp_path / "out")
    assert "plain text" in error.problem


# ── real files ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "form", "documents"),
    [
        ("gsm8k_test.jsonl", "question_answer", 1319),
        ("lf_alpaca_en_demo.json", "instruction", 985),
        ("lf_alpaca_zh_demo.json", "instruction", 992),
        ("lf_identity.json", "instruction", 91),
        ("gpteacher_roleplay.json", "instruction", 1923),
        ("tinyshakespeare.txt", "text", 1),
    ],
)
def test_real_files(  # noqa: PLR0917
    tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, name: str, form: str, documents: int
) -> None:  # fmt: skip
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not here")
    model = make_model(words="stories", vocab_size=512, context=4096)
    config = make_config(str(SHARED / name), evaluate={"validation": 0.0})
    manifest, _ = run(config, tmp_path / "out", model=model)
    assert manifest.sources[0].format == form
    assert manifest.documents == documents
    assert manifest.rows_read == documents + manifest.duplicates + sum(manifest.dropped.values())


@pytest.mark.parametrize(
    ("name", "problem"), [("lf_dpo_zh_demo.json", "preferences"), ("tang_poems.json", "paragraphs")]
)
def test_real_files_of_other_forms_are_refused(
    tmp_path: Path, make_config: MakeConfig, name: str, problem: str
) -> None:  # fmt: skip
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not here")
    assert problem in refusal(make_config(str(SHARED / name)), tmp_path / "out").problem


def test_rows_of_gsm8k_are_full(tmp_path: Path, make_config: MakeConfig, make_model: MakeModel) -> None:
    if not (SHARED / "gsm8k_train.jsonl").is_file():
        pytest.skip(f"{SHARED} is not here")
    model = make_model(words="stories", vocab_size=512, context=4096)
    config = make_config(str(SHARED / "gsm8k_train.jsonl"), train={"max_length": 1024})
    manifest, _ = run(config, tmp_path / "out", model=model)
    assert manifest.fill >= 0.97
    loader = open_loader(tmp_path / "out", seed=0, global_batch_size=32, rank=0, world_size=1, micro_batch_size=4)
    steps = range(loader.steps_per_epoch)
    assert sum(len(loader.step(step).documents) for step in steps) == manifest.documents == 7473 - 149
