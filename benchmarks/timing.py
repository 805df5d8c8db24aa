"""A fair clock: it interleaves variants of one piece of work, and compares the times of the same round.

The speed of a machine changes from one minute to the next, with other loads and its clock rate, but hardly within a
round. So each round runs every variant once, in an order that rotates and is reversed every other round. The median of
the rounds' ratios is reported, with its 20% and 80% quantiles. One variant, the control, runs twice in each round,
under two names. The ratio between these two is 1 on a quiet machine; see `Comparison.spread`.
"""

import ctypes
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

AGAIN = " (again)"  # what the control's second name ends in
LARGEST_SPREAD = 0.15
COLD_BYTES = 2**28  # All input sets together exceed this, which is several times a core's share of any cache.
MOST_SETS = 64
MOST_REPEATS = 1000
CYCLES_PER_SECOND = 2e9  # of a GPU, roughly
LONGEST_WAIT = 0.1  # seconds

Clock = Callable[[Callable[[Any], object], Any], float]  # It takes (run, state) and returns the seconds of run(state).


@dataclass(frozen=True)
class Variant:
    """One way to do the work."""

    run: Callable[[Any], object]  # It is timed.
    prepare: Callable[[int], Any]  # Untimed, it makes the state that the n-th call of `run` takes, and rotates inputs.


@dataclass(frozen=True)
class Quantiles:
    median: float
    low: float  # 20%
    high: float  # 80%

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantiles":
        low, median, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
        return cls(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """The seconds that every variant took, round by round."""

    seconds: Mapping[str, Sequence[float]]
    control: str

    def time(self, name: str) -> Quantiles:
        return Quantiles.of(self.seconds[name])

    def ratio(self, name: str, to: str) -> Quantiles:
        """Returns quantiles of the rounds' ratios: the time of `name` over that of `to` in the same round."""
        return Quantiles.of([a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])

    @property
    def spread(self) -> float:
        """The width of the smallest interval that holds 1 and the 20% and 80% quantiles of the ratio between the
        control's two runs of a round, as its upper over its lower end, less 1.

        So it grows with noise, and with a bias that depends on the position in the round.
        """
        between = self.ratio(self.control + AGAIN, self.control)
        return max(1.0, between.high) / min(1.0, between.low) - 1

    @property
    def void(self) -> bool:
        """Whether the control spreads over 15%: then the machine was not quiet enough, and no ratio here counts."""
        return self.spread > LARGEST_SPREAD

    def verdict(self) -> str:
        return f"{'VOID: ' if self.void else ''}control {self.control!r} spreads over {self.spread:.1%}"


def compare(
    variants: Mapping[str, Variant],
    control: str,
    clock: Clock,
    *,
    rounds: int,
    sample_seconds: float = 0.005,
) -> Comparison:
    """Times every variant once a round.

    Before the first round each variant is called twice. So what it compiles, allocates or caches at first use is not
    counted, and the second call's time gives the number of calls that last `sample_seconds`; a sample is their mean.

    Raises ValueError where there is no such control, or less than one round.
    """
    if control not in variants:
        raise ValueError(f"control is {control!r}: expected one of {', '.join(variants)}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: expected at least 1")
    timed = {**variants, control + AGAIN: variants[control]}
    calls, repeats = dict.fromkeys(timed, 0), {}

    def sample(name: str, repeat: int) -> float:
        total = 0.0
        for _ in range(repeat):
            total += clock(timed[name].run, timed[name].prepare(calls[name]))
            calls[name] += 1
        return total / repeat

    for name in timed:
        sample(name, 1)
        seconds = sample(name, 1)
        repeats[name] = min(MOST_REPEATS, max(1, math.ceil(sample_seconds / max(seconds, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds):
        for name in order(list(timed), number):
            times[name].append(sample(name, repeats[name]))
    return Comparison(times, control)


def order(names: Sequence[str], number: int) -> list[str]:
    """Returns the order of round `number`.

    It is rotated by one every other round and reversed in between. So over the rounds every variant has every position,
    and none always follows the same other one.
    """
    turn = number // 2 % len(names)
    rotated = [*names[turn:], *names[:turn]]
    return rotated[::-1] if number % 2 else rotated


def input_sets(nbytes: int) -> int:
    """Returns how many sets of inputs of `nbytes` to rotate, so that no cache holds those of the next call."""
    return min(MOST_SETS, max(2, -(-COLD_BYTES // max(1, nbytes))))


def clock_of(device: torch.device) -> Clock:
    return _CudaClock(device) if device.type == "cuda" else _wall


def _wall(run: Callable[[Any], object], state: Any) -> float:
    begin = time.perf_counter()
    result = run(state)
    seconds = time.perf_counter() - begin
    del result  # To give memory back is not part of the work.
    return seconds


def host_seconds(clock: Clock, run: Callable[[Any], object]) -> float | None:
    """Returns the least time that `run` kept the host busy under a GPU's clock; None on a CPU, where it is the time."""
    return clock.host[run] if isinstance(clock, _CudaClock) else None


class _CudaClock:
    """Measures the device's time between CUDA events, without the host's, which is in `host`.

    The device is kept busy until the host has launched everything that is timed. It first overwrites a buffer larger
    than the L2 cache, which empties the cache, and then waits for twice as long as the host took before, at most
    LONGEST_WAIT.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(4 * cache, COLD_BYTES), dtype=torch.uint8, device=device)
        self.host: dict[Callable[[Any], object], float] = {}

    def __call__(self, run: Callable[[Any], object], state: Any) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self._buffer.zero_()
        torch.cuda._sleep(int(min(LONGEST_WAIT, 2 * self.host.get(run, 0.0)) * CYCLES_PER_SECOND))
        begin.record()
        before = time.perf_counter()
        run(state)
        taken = time.perf_counter() - before
        end.record()
        end.synchronize()
        self.host[run] = min(taken, self.host.get(run, math.inf))  # The first call may compile.
        return begin.elapsed_time(end) / 1000


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Returns the most bytes that `run()` holds at once, with its result, beyond what was held before.

    On a GPU it counts what torch's allocator gives out. On a CPU it counts resident memory, whose peak Linux resets on
    request; less than about a mebibyte is noise there, as the heap takes and gives back memory in larger pieces.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # Free memory that the heap keeps would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak_resident()
        before = resident_bytes("VmRSS")
        result = run()
        peak = resident_bytes("VmHWM")
    del result
    return max(0, peak - before)


def reset_peak_resident() -> None:
    """Resets the peak that `resident_bytes("VmHWM")` returns (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(field: str) -> int:
    """Returns this process's resident bytes: "VmRSS" is now, "VmHWM" at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: expected VmRSS or VmHWM")
