"""Numbers and tables as plain text."""

import pytest

from engine.system.formatting import align_columns, format_count, format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1200, "1.2k"), (58_340_000, "58.34M"), (-2e9, "-2G"), (1e12, "1T"), (2.5e18, "2.5E")],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_columns_are_aligned_and_end_without_spaces() -> None:
    assert align_columns([("name", "n", ""), ("a", "100", "x"), ("", "1", "")]) == [
        "name    n",
        "a     100  x",
        "        1",
    ]
