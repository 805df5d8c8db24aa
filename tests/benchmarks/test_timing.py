"""The fair clock: its arithmetic under a clock that returns given times, and its measure of memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.timing import Comparison, Variant, compare, input_sets, order, peak_bytes


class FakeClock:
    """Takes from each call of a variant the seconds it stands for."""

    def __init__(self) -> None:
        self.ran: list[Any] = []

    def __call__(self, run: Callable[[Any], Any], state: Any) -> float:
        self.ran.append(state)
        return run(state)


def constant(seconds: float) -> Variant:
    return Variant(lambda _: seconds, lambda number: number)


def test_ratios_are_taken_within_rounds():
    """A machine that slows down fivefold during the run leaves ratios as they are."""
    drift = iter(range(10**9))

    def slower(seconds: float) -> Variant:
        return Variant(lambda _: seconds * (1 + 0.001 * next(drift)), lambda number: number)

    compared = compare({"a": slower(1.0), "b": slower(3.0)}, "a", FakeClock(), rounds=1000, sample_seconds=0)
    assert compared.seconds["a"][-1] > 3.9 * compared.seconds["a"][0]
    ratio = compared.ratio("b", to="a")
    assert ratio.median == pytest.approx(3, rel=0.01)
    assert ratio.low == pytest.approx(3, rel=0.01)
    assert not compared.void


def test_quantiles():
    compared = Comparison({"a": [float(k) for k in range(1, 12)], "b": [2.0] * 11}, "b")
    time, ratio = compared.time("a"), compared.ratio("a", to="b")
    assert (time.low, time.median, time.high) == (3, 6, 9)
    assert (ratio.low, ratio.median, ratio.high) == (1.5, 3, 4.5)


@pytest.mark.parametrize(
    ("again", "spread", "void"),
    [
        ([1.0] * 10, 0.0, False),
        ([1.14] * 10, 0.14, False),  # A bias that depends on the position is a spread too.
        ([1.16] * 10, 0.16, True),
        ([1 / 1.16] * 10, 0.16, True),
        ([1.0] * 9 + [9.0], 0.0, False),  # a round with a hiccup
        ([1.0] * 5 + [1.2] * 5, 0.2, True),
        ([0.92] * 5 + [1.08] * 5, 0.1739, True),
    ],
)
def test_a_run_is_void_where_its_control_spreads(again: list[float], spread: float, void: bool):
    compared = Comparison({"copy": [1.0] * 10, "copy (again)": again}, "copy")
    assert compared.spread == pytest.approx(spread, abs=1e-4)
    assert compared.void == void
    assert compared.verdict().startswith("VOID") == void


def test_every_variant_has_every_place_equally_often():
    names = ["a", "b", "c", "d"]
    rounds = [order(names, k) for k in range(8)]
    for name in names:
        assert sorted(places.index(name) for places in rounds) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_short_calls_are_repeated_on_other_inputs():
    clock = FakeClock()
    compared = compare({"a": constant(0.001)}, "a", clock, rounds=3, sample_seconds=0.0045)
    assert compared.seconds["a"] == pytest.approx([0.001] * 3), "the mean of its calls"
    assert sorted(clock.ran) == sorted([*range(17), *range(17)]), "of the control and its double: 2 + 3 × 5 each"


def test_inputs_that_no_cache_holds():
    assert input_sets(2**30) == 2
    assert input_sets(2**26) == 4
    assert input_sets(1) == 64


def test_peak_memory_counts_what_was_freed_again():
    def run() -> torch.Tensor:
        torch.ones(32 * 2**20)  # 128 MiB, gone at once
        return torch.ones(16 * 2**20)

    peak = peak_bytes(run, torch.device("cpu")) / 2**20
    assert peak == pytest.approx(128, abs=8)


def test_an_unknown_control():
    with pytest.raises(ValueError, match="control is 'c': expected one of a, b"):
        compare({"a": constant(1), "b": constant(1)}, "c", FakeClock(), rounds=1)
