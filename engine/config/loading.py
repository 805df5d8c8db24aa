"""Settings from YAML and the command line, in three layers: a later layer goes over an earlier one.

The layers are the defaults of `engine.config.settings`, a YAML file (`--config`) and dotted overrides such as
`students.0.layers=8`, or `students.layers=8` for every student. An unknown key or a value of the wrong type is a
UserError; nothing is ignored.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from engine.config.presets import PRESETS
from engine.config.settings import Config
from engine.system.errors import UserError
from engine.system.files import write_text

C = TypeVar("C")
_adapter = functools.cache(pydantic.TypeAdapter)


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the settings in a YAML file as nested dictionaries and lists; UserError where it holds none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a YAML file of settings")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())}); correct the file") from None
    if not isinstance(settings, dict):
        raise UserError(
            f"{path}: expected a mapping of settings, such as 'train: {{steps: 1000}}', found {type(settings).__name__}"
        )
    return settings


def build(cls: type[C], settings: dict[str, Any], overrides: Sequence[str] = ()) -> C:
    """Returns dataclass `cls` filled from nested settings and `a.b.0.c=value` overrides. A list's key that is no number
    sets the value in each of its items.

    Raises UserError for what does not fit; the message names the key, what was expected and the nearest known key.
    """
    for override in overrides:
        _apply_override(settings, override)
    if isinstance(students := settings.get("students"), list):
        settings = {**settings, "students": [_with_preset(student) for student in students]}
    try:
        return _adapter(cls).validate_python(settings)
    except pydantic.ValidationError as error:
        raise UserError(_one_line(cls, error)) from None


def save(config: Config, path: Path, **comments: str) -> None:
    """Writes the settings as YAML, with `comments`, such as the git commit, as leading comment lines."""
    leading = "".join(f"# {key}: {value}\n" for key, value in comments.items())
    write_text(path, leading + yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True))


def as_dict(config: Any) -> dict[str, Any]:
    """Returns settings as plain dictionaries and lists, equal to what YAML reads back."""
    return _adapter(type(config)).dump_python(config, mode="json")


def flatten(config: Any) -> dict[str, Any]:
    """Returns the settings by dotted key, as overrides name them."""

    def leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict | list):
            yield prefix, value
            return
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{prefix}.{key}".lstrip("."))

    return dict(leaves(as_dict(config), ""))


def _apply_override(settings: dict[str, Any], override: str) -> None:
    """Sets one `a.b.0.c=value` in nested dictionaries and lists, in place."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise UserError(f"{override!r}: expected key=value, such as train.steps=1000")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not YAML; put quotes around text with special signs") from None
    parents: list[Any] = [settings]
    keys = path.split(".")
    for depth, (key, next_key) in enumerate(pairwise(keys)):
        parents = _each_item(parents, key)
        new = list if next_key == "0" else dict
        parents = [parent[_key_in(parent, key, path, empty=new())] for parent in parents]
        if not all(isinstance(parent, dict | list) for parent in parents):
            raise UserError(f"{override!r}: {'.'.join(keys[: depth + 1])} is a value and has no {keys[depth + 1]!r}")
    for parent in _each_item(parents, keys[-1]):
        parent[_key_in(parent, keys[-1], path, empty=None)] = value


def _each_item(parents: list[Any], key: str) -> list[Any]:
    """Returns the parents, but where `key` is a name and a parent is a list of mappings, the mappings."""
    result: list[Any] = []
    for parent in parents:
        named = isinstance(parent, list) and key.isidentifier() and all(isinstance(item, dict) for item in parent)
        result += parent if named and parent else [parent]
    return result


def _key_in(items: Any, key: str, path: str, empty: Any) -> Any:
    """Returns the key of a dictionary, or the index of a list, that `key` names; a new or a null one holds `empty`."""
    if isinstance(items, dict):
        if items.get(key) is None:
            items[key] = empty
        return key
    if not key.isdecimal() or int(key) > len(items):
        raise UserError(
            f"{path}: {key!r} is not an index of a list of {len(items)}: expected 0 to {len(items)} "
            f"({len(items)} appends an item)"
        )
    if int(key) == len(items):
        items.append(empty)
    return int(key)


def _with_preset(student: Any) -> Any:
    """Returns a student's settings over those of the preset that it names."""
    name = student.get("preset") if isinstance(student, dict) else None
    if name is None:
        return student
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"preset {name!r} is not known: expected one of {', '.join(PRESETS)}")
    return {**PRESETS[name], **student}


def _one_line(cls: type, error: pydantic.ValidationError) -> str:
    errors = error.errors()
    # A misspelt key also leaves the right one missing; the misspelling is what to mend.
    first = next((e for e in errors if e["type"] == "unexpected_keyword_argument"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        known = _keys_at(cls, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        expected = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        return f"unknown key {key!r}: {expected}"
    if first["type"] == "missing":
        return f"{key} is missing: set it in the YAML file, or as {key}=value"
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys_at(cls: type, location: tuple[int | str, ...]) -> list[str]:
    """Returns the keys of the dataclass at a location such as ("students", 0)."""
    for part in location:  # An index of a list and a key of a dictionary are no fields: the dataclass stays.
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        cls = _dataclass_in(kinds.get(str(part))) or cls
    return [field.name for field in dataclasses.fields(cls)]


def _dataclass_in(kind: Any) -> type | None:
    """Returns the dataclass that a field of type `kind` holds, alone or in a list, a dictionary or a union."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind
    return next(filter(None, map(_dataclass_in, get_args(kind))), None)
