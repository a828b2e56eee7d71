"""What the READMEs and the documentation say is so: their commands, options, keys, functions and links exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from foretune.cli import app
from foretune.config import parse_config
from foretune.config.load import all_keys
from foretune.config.schema import Config

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
TEXTS = (*READMES, "docs/road.md", "docs/road.zh-CN.md", "docs/configuration.md", "docs/configuration.zh-CN.md")
SETUP = ["make demo", "make test"]
_LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)(?:#[^)]*)?\)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(name), flags=re.MULTILINE | re.DOTALL)


def command_lines(name: str) -> list[str]:
    """Lines of the bash blocks that are commands, without those of a heredoc."""
    lines: list[str] = []
    for block in blocks(name, "bash"):
        end = None
        for line in block.splitlines():
            if end is not None:
                end = None if line == end else end
                continue
            if line.strip():
                lines.append(line)
            heredoc = re.search(r"<<'(\w+)'", line)
            end = heredoc[1] if heredoc else None
    return lines


FORETUNE_LINES = sorted({line for name in READMES for line in command_lines(name) if line.startswith("foretune ")})


def test_both_readmes_give_the_same_commands() -> None:
    assert blocks(READMES[0], "bash") == blocks(READMES[1], "bash")
    assert blocks(READMES[0], "text")[0] == blocks(READMES[1], "text")[0], "the same transcript"


@pytest.mark.parametrize("name", READMES)
def test_setting_up_comes_first(name: str) -> None:
    assert command_lines(name)[:2] == SETUP
    targets = re.findall(r"^(\w[\w-]*):", read("Makefile"), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_there_are_commands_to_check() -> None:
    assert len(FORETUNE_LINES) >= 8


@pytest.mark.parametrize("line", FORETUNE_LINES)
def test_the_command_line_can_be_parsed(line: str) -> None:
    """The verb and all its options exist and their values are of the right kind; typer refuses anything else."""
    _, verb, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    with command.make_context(verb, arguments) as context:
        settings = context.params.get("settings") or []
    for setting in settings:
        assert setting.partition("=")[0] in all_keys()


def test_an_option_that_is_not_there_would_be_found() -> None:
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    with pytest.raises(typer.BadParameter.__mro__[1], match="epoch-count"):
        command.make_context("run", ["--model", "m", "--epoch-count", "1"])


@pytest.mark.parametrize("name", READMES)
def test_the_table_of_verbs_is_that_of_the_command_line(name: str) -> None:
    told = re.findall(r"^\| `foretune (\w+)` \|", read(name), flags=re.MULTILINE)
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    called = set(re.findall(r"/foretune (\w+)", read("Makefile")))
    assert len(told) == len(set(told))
    assert verbs <= set(told) <= verbs | called


@pytest.mark.parametrize("name", READMES)
def test_the_configuration_is_the_defaults(name: str) -> None:
    """The example sets nothing but defaults: read, it equals a configuration of its two required values."""
    (text,) = blocks(name, "yaml")
    values = yaml.safe_load(text)
    assert parse_config(values) == parse_config({"model": "gpt2", "data": "examples.jsonl"})
    assert values == json.loads(json.dumps(values)), "plain values only"


@pytest.mark.parametrize("name", ["docs/configuration.md", "docs/configuration.zh-CN.md"])
def test_every_key_is_documented_with_its_default(name: str) -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", read(name), flags=re.MULTILINE))
    keys = [key for key in all_keys() if not any(other.startswith(f"{key}.") for other in all_keys())]
    assert list(rows) == keys, "every key that holds a value, in the order of the schema, and no other"
    example = parse_config({"model": "gpt2", "data": "examples.jsonl"}).model_dump(mode="json")
    for key, row in rows.items():
        if key in ("model", "data.sources.path"):
            continue
        value = example
        for part in key.split("."):
            value = value[part]
            value = value[0] if part == "sources" else value
        default = row.split(" | ")[1]
        assert yaml.safe_load(default.strip("`")) == value, key


def test_required_keys_are_marked_as_such() -> None:
    required = [name for name, field in Config.model_fields.items() if field.is_required()]
    assert required == ["model", "data"]
    assert "| `model` | text | required |" in read("docs/configuration.md")
    assert "| `data.sources.path` | text | required |" in read("docs/configuration.md")


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    links = _LINK.findall(read(name))
    assert links
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", ["docs/road.md", "docs/road.zh-CN.md"])
def test_functions_that_the_road_names_exist(name: str) -> None:
    """``[`function`](../foretune/file.py)`` names something that the file defines."""
    named = re.findall(r"\[`([\w.]+)`\]\((\.\./foretune/[\w/]+\.py)\)", read(name))
    assert len(named) >= 20
    for function, path in named:
        source = (ROOT / "docs" / path).read_text(encoding="utf-8")
        for part in function.split("."):
            assert re.search(rf"^\s*(def|class) {part}\b|^{part}\b.*=", source, flags=re.MULTILINE), (function, path)


@pytest.mark.parametrize("name", ["README.md", "docs/road.md", "docs/configuration.md"])
def test_both_languages_have_the_same_links(name: str) -> None:
    chinese = name.replace(".md", ".zh-CN.md")
    first, second = ([link.replace(".zh-CN", "") for link in _LINK.findall(read(text))] for text in (name, chinese))
    assert first == second
