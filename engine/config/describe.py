"""Every setting with its default and its meaning, as YAML: what `--settings` prints."""

import ast
import dataclasses
import inspect
import types
from collections.abc import Iterator
from itertools import dropwhile
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

# What stands above the settings of a dataclass that a list, a dictionary or a union with None holds.
_CONTAINERS: dict[Any, tuple[str, str]] = {
    tuple: (" This is a list, and each item has these settings.", "-"),
    dict: (" This is a mapping, and each of its keys has these settings.", "<dotted key>:"),
    types.UnionType: (" null, the default, leaves it out.", ""),
}


def describe(cls: type) -> str:
    """Returns the settings of a dataclass as YAML: a comment with the meaning above each one, and its default.

    The comments are the docstrings in `engine.config.settings`. A setting without a default has `null` and is marked
    as required.
    """
    return "\n".join(_lines(cls, indent="")) + "\n"


def dataclass_in(kind: Any) -> type | None:
    """Returns the dataclass that a setting of type `kind` holds, alone or in a list, a dictionary or a union."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind
    return next(filter(None, map(dataclass_in, get_args(kind))), None)


def _lines(cls: type, indent: str) -> Iterator[str]:
    meanings = _meanings(cls)
    for setting in dataclasses.fields(cls):
        required = setting.default is dataclasses.MISSING
        meaning = meanings[setting.name] + (" Required." if required else "")
        inner = dataclass_in(setting.type)
        if inner is None:
            choices = ", ".join(map(str, _choices(setting.type)))
            yield f"{indent}# {meaning}" + (f" One of: {choices}." if choices else "")
            yield f"{indent}{setting.name}: {_as_yaml(None if required else setting.default)}"
            continue
        note, item = _CONTAINERS.get(get_origin(setting.type), ("", ""))
        yield from ("", f"{indent}# {meaning}{note}", f"{indent}{setting.name}:")
        inner_indent = indent + "  "
        if item:
            yield inner_indent + item
            inner_indent += "  "
        yield from dropwhile(lambda line: not line, _lines(inner, inner_indent))


def _meanings(cls: type) -> dict[str, str]:
    """Returns the docstring below each field of a dataclass, or that of the dataclass which the field holds."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    meanings, name = {}, None
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            meanings[name], name = " ".join(str(statement.value.value).split()), None
    for field in dataclasses.fields(cls):
        inner = dataclass_in(field.type)
        if inner is not None and field.name not in meanings:
            meanings[field.name] = (inspect.getdoc(inner) or "").split("\n\n")[0].replace("\n", " ")
    return meanings


def _choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Annotated:
        return _choices(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) is Literal else ()


def _as_yaml(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
