"""The benchmark of the outer loop runs, and its ways are in the order that their passes must have."""

import pytest

from benchmarks import outer_loop


@pytest.mark.slow
def test_every_way_is_timed() -> None:
    rows = {
        way: dict(zip(outer_loop.COLUMNS, row, strict=True)) for row in outer_loop.measured(3, 1) for way in [row[1]]
    }
    assert list(rows) == list(outer_loop.WAYS)
    assert 0 < rows["first"]["steps"] < rows["forward"]["steps"], "the second term costs passes of its own"
    for row in rows.values():
        assert row["share_every_5"] == pytest.approx(row["steps"] / (row["steps"] + 5))
