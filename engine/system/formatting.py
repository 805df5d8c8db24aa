"""Numbers and tables as plain text."""

from collections.abc import Sequence


def format_count(value: float) -> str:
    """Returns four significant digits and a unit, such as 58.34M or 1.2k, up to E (10¹⁸); no unit below 1,000."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """Returns h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns one line per row: the first column is aligned to the left, the others to the right, without trailing
    spaces. All rows have equally many cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
