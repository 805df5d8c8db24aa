"""Every setting with its default and its meaning, as YAML: what `--settings` prints."""

import ast
import dataclasses
import inspect
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml


def describe(cls: type) -> str:
    """Returns the settings of a dataclass as YAML: a comment with the meaning above each one, and its default.

    The comments are the docstrings in `engine.config.settings`. A setting without a default has `null` and is marked
    as required.
    """
    return "\n".join(_lines(cls, indent="")) + "\n"


def _lines(cls: type, indent: str) -> Iterator[str]:
    meanings = _meanings(cls)
    for setting in dataclasses.fields(cls):
        inner, is_list = _dataclass_in(setting.type)
        if inner is not None:
            yield ""
            summary = (inspect.getdoc(inner) or "").split("\n\n")[0].replace("\n", " ")
            optional = " A list; each item has these settings." if is_list else ""
            empty = "" if setting.default or is_list else " null: none."
            yield f"{indent}# {summary}{optional}{empty}"
            yield f"{indent}{setting.name}:"
            lines = list(_lines(inner, indent + "  " * (2 if is_list else 1)))
            while lines[0] == "":
                lines.pop(0)
            if is_list:
                yield f"{indent}  -"
            yield from lines
            continue
        required = setting.default is dataclasses.MISSING
        choices = _choices(setting.type)
        among = f" One of: {', '.join(map(str, choices))}." if choices else ""
        yield f"{indent}# {meanings[setting.name]}{among}{' Required.' if required else ''}"
        yield f"{indent}{setting.name}: {_plain(None if required else setting.default)}"


def _meanings(cls: type) -> dict[str, str]:
    """Returns the docstring below each field of a dataclass, by the field's name."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    meanings, name = {}, None
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            meanings[name], name = " ".join(str(statement.value.value).split()), None
    return meanings


def _dataclass_in(kind: Any) -> tuple[type | None, bool]:
    """Returns the dataclass that a field holds, and whether it holds several."""
    if dataclasses.is_dataclass(kind):
        return kind if isinstance(kind, type) else None, False
    if get_origin(kind) in (tuple, dict, Union, types.UnionType):
        inner = next((arg for arg in get_args(kind) if dataclasses.is_dataclass(arg)), None)
        return inner if isinstance(inner, type) else None, get_origin(kind) is tuple
    return None, False


def _choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Annotated:
        return _choices(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) is Literal else ()


def _plain(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
