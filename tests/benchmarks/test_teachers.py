"""What teachers cost in a step, measured on tiny ones, and int8's error on a run that has learnt from teachers."""

import re
from pathlib import Path

import pytest

from benchmarks import cases, teachers
from engine.train import train
from tests.engine.teachers.tiny_teachers import distilled, train_teachers


@pytest.mark.slow
def test_every_variant_takes_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(teachers.TASKS, "tiny", (["1x16x2x32"], ["1x32x2x48", "1x16x2x32"], 300))
    monkeypatch.setattr(cases, "SEQUENCES", 24)
    teachers.measure(tmp_path, "tiny", ["train.length=16"], rounds=1)
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if " ms (" in line] == list(teachers.VARIANTS)
    assert "cache: 192 bytes a token, int8 56" in said
    ratios = re.findall(r"(?:cached|heads\)|alone): ([\d.]+)", said)
    assert len(ratios) == 3
    assert all(float(ratio) > 0 for ratio in ratios)
    assert len(list(tmp_path.glob("cache/t?/part-*"))) == 2, "each teacher's states are in one part"


def test_int8_is_close_to_exact(tmp_path: Path) -> None:
    train_teachers(tmp_path)
    config = distilled(tmp_path, "taught")
    train(config)
    rows = re.findall(r"\| (.*) \| ([\d.]+) \| ([\d.]+) \|", teachers.quality(tmp_path / "runs" / "taught"))
    assert [row[0] for row in rows] == [
        "LLaMA's states",
        "GPT-2's states",
        "gradient of the loss",
        "of the divergence alone",
    ]
    for _, cosine, error in rows:
        assert float(cosine) > 0.999
        assert 0 < float(error) < 0.03
