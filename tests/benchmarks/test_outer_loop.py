"""The benchmark of the outer loop times an update with each choice of terms."""

import pytest

from benchmarks import outer_loop
from engine.models.llama import LlamaShape

TINY = LlamaShape(layers=1, hidden=16, heads=2, kv_heads=2, ffn=32, vocab_size=64, max_length=16)


def test_every_choice_of_terms_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer_loop, "SHAPE", TINY)
    rows = [dict(zip(outer_loop.COLUMNS, row, strict=True)) for row in outer_loop.measure(3, rounds=1)]
    assert [row["terms"] for row in rows] == ["all", "direct"]
    steps = {row["terms"]: row["steps"] for row in rows}
    assert 0 < steps["direct"] < steps["all"], "the second term costs passes of its own"
    for row in rows:
        assert row["share_every_5"] == pytest.approx(row["steps"] / (row["steps"] + 5))
