"""Every setting with its default and its meaning, as YAML: what `--settings` prints."""

from collections.abc import Iterator
from typing import Any

import pydantic
import yaml

Schema = dict[str, Any]


def describe(cls: type) -> str:
    """Returns the settings of a dataclass as YAML: a comment with the meaning above each one, and its default.

    The comments are the docstrings in `engine.config.settings`. A setting without a default has `null` and is marked
    as required.
    """
    schema = pydantic.TypeAdapter(cls).json_schema()
    return "\n".join(_lines(schema, schema.get("$defs", {}), indent="")) + "\n"


def _lines(schema: Schema, definitions: dict[str, Schema], indent: str, *, blank: bool = True) -> Iterator[str]:
    """Yields the lines of one dataclass; `blank` is whether a blank line may come first."""
    for name, setting in schema["properties"].items():
        required = " Required." if name in schema.get("required", ()) else ""
        reference, note, item = _reference(setting)
        if reference is None:
            one_of = f" One of: {', '.join(map(str, setting['enum']))}." if "enum" in setting else ""
            default = yaml.safe_dump(setting.get("default"), default_flow_style=True, width=1000).split("\n")[0]
            yield f"{indent}# {setting['description']}{required}{one_of}".replace("\n", " ")
            yield f"{indent}{name}: {default}"
        else:
            inner = definitions[reference]
            meaning = setting.get("description", inner["description"]).split("\n\n")[0]
            yield from [""] if blank else []
            yield f"{indent}# {meaning}{required}{note}".replace("\n", " ")
            yield f"{indent}{name}:"
            yield from [f"{indent}  {item}"] if item else []
            yield from _lines(inner, definitions, indent + ("    " if item else "  "), blank=False)
        blank = True


def _reference(setting: Schema) -> tuple[str | None, str, str]:
    """Returns the name of the dataclass that a setting holds, a note on how it holds it, and what stands above it."""
    holders = [
        (setting, "", ""),
        (setting.get("items"), " This is a list, and each item has these settings.", "-"),
        (setting.get("additionalProperties"), " Each key of this mapping has these settings.", "<dotted key>:"),
        *((option, " null, the default, leaves it out.", "") for option in setting.get("anyOf", ())),
    ]
    for holder, note, item in holders:
        if isinstance(holder, dict) and "$ref" in holder:
            return holder["$ref"].rpartition("/")[2], note, item
    return None, "", ""
