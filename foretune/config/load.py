"""From a YAML file and a command line to one frozen `Config`, or to one error that names every fault.

file ──parse──▶ mapping ──overlay flags and --set──▶ mapping ──expand the data shorthand──▶ mapping ──validate──▶ Config
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from foretune.config.schema import Config, DataConfig, DataSource
from foretune.errors import ConfigError, UserError


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-5`` is a number (YAML 1.1 reads it as text), a key given twice is an error."""


# The dict is shared with SafeLoader until it is assigned anew: copy it, or every other reader of YAML would change too.
_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        if isinstance(key, str):
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def load_config(
    path: Path | None = None, *, flags: Mapping[str, Any] | None = None, settings: Iterable[str] = ()
) -> Config:
    """Read a configuration.

    Args:
        path: YAML file; None starts from nothing.
        flags: values of command-line flags by dotted key; None values are flags that were not given.
        settings: ``a.b=c`` strings; the right side is read as YAML. They win over flags, flags win over the file.

    Raises:
        ConfigError: every fault at once.
        UserError: the file is missing or is no YAML mapping.
    """
    values = _read_yaml(path) if path is not None else {}
    for key, value in (flags or {}).items():
        if value is not None:
            _overlay(values, key, value)
    for setting in settings:
        _overlay(values, *parse_setting(setting))
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate a mapping of keys. Raises `ConfigError` with every fault at once."""
    values = _expand_data(dict(values))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_faults(error, values)) from None


def parse_setting(setting: str) -> tuple[str, Any]:
    """Split ``a.b=c`` into its dotted key and its value, read as YAML."""
    key, separator, text = setting.partition("=")
    if not separator or not key.strip():
        raise UserError("--set", setting, "is not of the form key=value", "write for example --set train.epochs=2")
    try:
        return key.strip(), yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return key.strip(), text


def to_yaml(config: Config) -> str:
    """The configuration as YAML, in the order of the schema; reading it back gives an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            "CONFIG", str(path), "there is no such file", "check the path, or use --model and --data without a file"
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            "CONFIG", str(path), f"is not YAML: {' '.join(str(error).split())}", "mend the named line"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            "CONFIG", str(path), "holds no keys", "write lines such as `model: gpt2` and `data: examples.jsonl`"
        )
    return values


def _overlay(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. ``data`` given as a shorthand is expanded first, so that ``data.format`` can join it."""
    *parents, last = key.split(".")
    if parents and parents[0] == "data":
        values.update(_expand_data(values))
    if key == "data":
        value = _expand_data({"data": value})["data"]
        options = values.get("data")
        if isinstance(options, dict) and isinstance(value, dict):
            value = {**options, **value}
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError("--set", f"{key}={value}", f"{parent} holds a value, not keys", f"set {parent} itself")
        values = child
    values[last] = value


def _expand_data(values: dict[str, Any]) -> dict[str, Any]:
    """Bring the short forms of `data` (a path, a list of paths or sources, one source) to the one long form."""
    data = values.get("data")
    if isinstance(data, str | Path):
        data = {"sources": [{"path": str(data)}]}
    elif isinstance(data, list):
        data = {"sources": [{"path": str(item)} if isinstance(item, str | Path) else item for item in data]}
    elif isinstance(data, dict) and "path" in data:
        source_keys = set(DataSource.model_fields) - set(DataConfig.model_fields)
        source = {key: data[key] for key in source_keys & set(data)}
        data = {**{key: value for key, value in data.items() if key not in source_keys}, "sources": [source]}
    return values if data is None else {**values, "data": data}


def _faults(error: ValidationError, values: Mapping[str, Any]) -> list[UserError]:
    """One fault per field: pydantic reports one per branch of a union, which no user should have to read."""
    by_field: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_field.setdefault(_dotted(item["loc"]), []).append(item)
    return [_fault(field, items, values) for field, items in by_field.items()]


def _fault(field: str, items: list[Any], values: Mapping[str, Any]) -> UserError:
    kinds = {item["type"] for item in items}
    value = items[0]["input"]
    if "extra_forbidden" in kinds:
        return UserError(field, value, "there is no such key", _nearest(field))
    if "missing" in kinds:
        what = {"model": "a hub id, a folder or a .gguf file", "data": "a file of examples"}.get(field, "a value")
        return UserError(
            field, None, "is required", f"give {what}, for example --{field} …" if "." not in field else f"give {what}"
        )
    wanted = " or ".join(
        dict.fromkeys(item["msg"].removeprefix("Input should be ").removeprefix("a valid ") for item in items)
    )
    return UserError(field, value, f"should be {wanted}", f"set {field} to {wanted}")


def _dotted(location: tuple[int | str, ...]) -> str:
    """The dotted key of an error's location, without the names of union branches that pydantic appends."""
    names: list[str] = []
    known: Any = Config
    for part in location:
        if isinstance(part, int):
            names[-1] += f"[{part}]"
            known = DataSource if names[-1].startswith("sources[") else None
            continue
        if known is None:
            break
        names.append(part)
        known = _section(known, part)
    return ".".join(names)


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a field holds (or holds a list of), None if it holds a value."""
    field = model.model_fields.get(name)
    for candidate in _types(field.annotation if field else None):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _types(annotation: Any) -> Iterable[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, list):
        for argument in typing.get_args(annotation):
            yield from _types(argument)
    else:
        yield annotation


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, in its order."""
    keys: list[str] = []
    for name in model.model_fields:
        section = _section(model, name)
        keys.append(prefix + name)
        if section is not None:
            keys += all_keys(section, f"{prefix}{name}.")
    return keys


#: What people call some keys.
_SHORT_NAMES = {
    "lr": "learning_rate",
    "batch_size": "global_batch_size",
    "bs": "global_batch_size",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_seq_length": "max_length",
    "lr_scheduler_type": "schedule",
    "per_device_train_batch_size": "micro_batch_size_per_gpu",
}


def _nearest(field: str) -> str:
    """The known key nearest to an unknown one: alike as a whole, or with the same last word under another section."""
    known = all_keys()
    leaf = re.sub(r"\[\d+\]", "", field).rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] in (leaf, _SHORT_NAMES.get(leaf))]
    alike = difflib.get_close_matches(field, known, n=1, cutoff=0.6)
    alike_leaf = difflib.get_close_matches(leaf, [key.rpartition(".")[2] for key in known], n=1, cutoff=0.6)
    by_leaf = [key for key in known if alike_leaf and key.rpartition(".")[2] == alike_leaf[0]]
    for candidates in (same_leaf, alike, by_leaf):
        if candidates:
            return f"did you mean {candidates[0]}?"
    return "`foretune train -h` names the keys" if "." in field else f"the keys are {', '.join(Config.model_fields)}"
