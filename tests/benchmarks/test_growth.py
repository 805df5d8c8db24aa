"""Exponents of series that follow a power, and what is no series."""

import csv
from pathlib import Path

import pytest

from benchmarks import growth
from engine.system.errors import UserError


def write(path: Path, axis: str, values: list[int], power: float, **changes: object) -> Path:
    keys = (*growth.AXES, *growth.SAME, *growth.WITH_RANKS)
    same = dict.fromkeys(keys, "1") | {"variant": "ours", "void": "False", "tokens_per_second": 100} | changes
    with path.open("w", newline="") as file:
        names = [*same, "milliseconds", "milliseconds_low", "milliseconds_high", "beyond_state_mebibytes"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for x in values:
            times = dict.fromkeys(("milliseconds", "milliseconds_low", "milliseconds_high"), 7 * x**power)
            writer.writerow(same | times | {axis: x, "beyond_state_mebibytes": 3 * x**2})
    return path


def test_exponents(tmp_path: Path):
    series = growth.read(str(write(tmp_path / "v.csv", "vocabulary", [32000, 8000, 64000], 0.75)))
    assert list(series.x) == [8000, 32000, 64000]
    description = growth.describe(series)
    assert "step ∝ V^0.75" in description
    assert "memory beyond state ∝ V^2.00" in description
    assert "as many steps" not in description


@pytest.mark.parametrize(("power", "verdict"), [(1.0, "1.00, at most 1.1"), (1.2, "1.52, ABOVE 1.1")])
def test_students_beside_as_many_alone(power: float, verdict: str, tmp_path: Path):
    assert verdict in growth.describe(growth.read(str(write(tmp_path / "s.csv", "students", [1, 2, 4, 8], power))))


def test_teachers_from_none(tmp_path: Path):
    path = write(tmp_path / "k.csv", "teachers", [0, 1, 2], 1.0, void="True")
    path.write_text(path.read_text().replace("7.0,7.0,7.0", "9,9,9").replace("0.0,0.0,0.0", "2,2,2"))
    description = growth.describe(growth.read(str(path)))  # 2, 9 and 14: 2.33 + 6 K
    assert "step +2.57 of it for each teacher" in description
    assert description.startswith("VOID")


def test_ranks(tmp_path: Path):
    one = write(tmp_path / "one.csv", "ranks", [1], 1.0)
    two = write(tmp_path / "two.csv", "ranks", [2], 1.0, batch="2", zero_stage="7", tokens_per_second=170)
    assert "weak scaling: W=1 1.00, W=2 1.70" in growth.describe(growth.read(f"{one},{two}"))
    other = write(tmp_path / "other.csv", "ranks", [2], 1.0, task="another")
    with pytest.raises(UserError, match="ranks, task varies"):
        growth.read(f"{one},{other}")


def test_what_is_no_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "s.csv", "students", [1, 2], 1.0)
    assert growth.main([str(path), "--png", str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert growth.main([str(write(tmp_path / "none.csv", "students", [2, 2], 1.0))]) == 2
    assert "nothing varies" in capsys.readouterr().err
