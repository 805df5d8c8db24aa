import json
import runpy
import sys
from pathlib import Path

import pytest

from engine.config.loading import build
from engine.config.settings import Config
from engine.train import train

RECIPE = str(Path(__file__).parents[2] / "recipes" / "export.py")
TINY = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "max_length": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second student learns, the first hardly does."""
    folder = tmp_path_factory.mktemp("export")
    settings = {
        "students": [{"name": "slow", **TINY, "learning_rate": 1e-9}, {"name": "keen", **TINY, "learning_rate": 1e-2}],
        "run": {"name": "two", "folder": str(folder / "runs")},
        "data": {"folder": str(folder / "prepared"), "words": 3000, "tokenizer": {"vocab_size": 400}},
        "objective": {"weighted": True},
        "outer": {"initial": [1, 3]},
        "optimizer": {"warmup": 1},
        "train": {"steps": 4, "batch": 4, "length": 32},
        "evaluation": {"every": 4, "tokens": 200, "pairs": "none", "samples": 0},
        "checkpoint": {"every": 2},
    }
    train(build(Config, settings))
    return folder / "runs" / "two"


def test_a_run_without_a_checkpoint_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(SystemExit) as ended:
        export(monkeypatch, tmp_path)
    assert ended.value.code == 2
    assert f"{tmp_path} has no checkpoint yet" in capsys.readouterr().err


def export(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [RECIPE, *map(str, arguments)])
    runpy.run_path(RECIPE, run_name="__main__")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"slow", "keen"}),
        (["--student", "best"], {"keen"}),
        (["--student", "slow", "--checkpoint", "last"], {"slow"}),
        (["--checkpoint", "2"], {"slow", "keen"}),
    ],
)
def test_every_student_is_exported_or_the_one_asked_for(
    arguments: list[str], expected: set[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(monkeypatch, run, *arguments, "--to", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == expected | {"omega.json"}
    assert json.loads((tmp_path / "omega.json").read_text()) == {"slow": 0.25, "keen": 0.75}
    for name in expected:
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "third"], "--student third: expected best, or one of slow, keen"),
        (["--checkpoint", "first"], "--checkpoint first: expected best, last, or a step's number"),
        (["--checkpoint", "7"], "no such checkpoint"),
    ],
)
def test_what_is_not_there_is_named(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        export(monkeypatch, run, *arguments, "--to", tmp_path)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
