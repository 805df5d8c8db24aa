"""`--settings`: every recipe prints all of its settings, with default and meaning, as YAML."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import settings
from engine.config.describe import describe
from engine.config.settings import Config, PrepareConfig, ScoreConfig, SearchConfig, SweepConfig

ROOT = Path(__file__).parents[3]
DATACLASSES = [kind for kind in vars(settings).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("kind", DATACLASSES, ids=lambda kind: kind.__name__)
def test_every_setting_has_a_meaning_and_shows_its_default(kind: type) -> None:
    text = describe(kind)
    printed = yaml.safe_load(text)
    assert list(printed) == [field.name for field in dataclasses.fields(kind)]
    for field in dataclasses.fields(kind):
        (meaning,) = re.findall(rf"^# (.*)\n{field.name}:", text, re.MULTILINE)
        assert meaning[0].islower() or meaning[0].isupper(), f"{field.name}: {meaning}"
        assert meaning.endswith("."), f"{field.name}: {meaning}"
        assert ("Required." in meaning) == (field.default is dataclasses.MISSING), field.name
        if field.default is not dataclasses.MISSING and not isinstance(printed[field.name], dict):
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            if printed[field.name] != default:
                assert field.name == "teachers", f"{field.name}: {printed[field.name]!r}, not {default!r}"


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("mutual", Config),
        ("pretrain", Config),
        ("distill", Config),
        ("prepare", PrepareConfig),
        ("score", ScoreConfig),
        ("search", SearchConfig),
        ("sweep", SweepConfig),
    ],
)
def test_a_recipe_prints_its_settings(recipe: str, kind: type) -> None:
    command = [sys.executable, ROOT / "recipes" / f"{recipe}.py", "--settings"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout == describe(kind)
    assert finished.stderr == ""


def test_what_is_printed_for_lists_mappings_and_optional_settings() -> None:
    printed: dict[str, Any] = yaml.safe_load(describe(Config))
    students = [list(student) for student in printed["students"]]
    assert students == [[field.name for field in dataclasses.fields(settings.StudentConfig)]]
    assert list(printed["cache"]) == ["path", "dtype"]
    assert "default, leaves it out.\ncache:" in describe(Config)
    sweep = yaml.safe_load(describe(SweepConfig))
    assert sweep["parameters"] == {"<dotted key>": {"low": 0.0, "high": 0.0, "log": False, "choices": []}}
    assert "# What is varied, by dotted key, such as students.0.learning_rate. Required. " in describe(SweepConfig)
