"""Chooses how every Triton kernel is launched: two short rules, justified by `benchmarks/audit.py` (registers,
spills, load width, occupancy) or by `benchmarks/ops.py` on a GPU. No rule looks at a device: it sees shapes and the
number of threads in a warp.

Shapes: S students, K teachers, R = S + K streams.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: `warps` warps take `block` elements of a row at a time."""

    block: int
    warps: int
    parts: int = 1  # A thread cuts its share of a block into so many parts and works on one after the other.
    sweeps: int = 1  # The row is read so many times, for sums that do not fit in registers together.


def blocks(elements: int, block: int) -> int:
    """Returns how many blocks hold the elements. (Triton has such a function, which kernels use. Called from Python, it
    takes as long as a small kernel.)"""
    return -(-elements // block)


def power_of_2(n: int) -> int:
    """Returns the smallest power of 2 that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


STUDENTS_AT_ONCE = 4  # One launch computes losses and gradients of so many students. With more, registers spill.


def ensemble_kl(
    width: int, students: int, streams: int, vector: int, lanes: int, *, plain: bool, paired: bool
) -> Launch:
    """128 threads read 16 bytes of each stream at a time, or 256 threads where there is little to hold in registers. If
    128 threads can hold the whole row, `block` >= width. More threads could hold longer rows, but that is slower than
    reading the row again (LOG.md, 2026-11-22). Without `parts` and `sweeps` registers spill: with S students a thread
    holds S·(R − 1) sums. AMD has twice the registers per thread and needs no sweeps.

    Args:
        width: The number of columns, padding included. vector: The number of logits in 16 bytes.
        lanes: The threads of a warp: 64 on AMD, else 32.
        plain: Whether the divergence is "forward" and the streams have one dtype. Else no row stays on chip.
        paired: Whether fp32 is computed on pairs of registers, as on NVIDIA from sm_100 on, which takes more registers.
    """
    if plain and students <= 2 and streams <= 3:
        tile = 128 * vector
        if width <= 4 * tile:  # 64 bytes per stream and thread.
            return Launch(-(-width // tile) * tile, 128 // lanes)
        return Launch(256 * vector, 256 // lanes)
    if students > STUDENTS_AT_ONCE:  # One element at a time, and half of the sums.
        return Launch(128 * vector, 128 // lanes, parts=vector, sweeps=2 if lanes == 32 else 1)
    parts = 1 if vector == 4 or streams < 4 else 2 if students == 1 else 4
    if plain and streams <= 5 and students * (streams - 1) <= (6 if paired or lanes == 64 else 12):
        parts = 1
    return Launch(128 * vector, 128 // lanes, parts=parts)


def rows(columns: int, most_warps: int = 32) -> Launch:
    """A program takes one row, or several short ones. A row is one of `rms_norm`'s, a token's pairs in all heads of
    `rotary`, or part of one of `swiglu`'s. A thread has 16 elements: two 128-bit loads of 16-bit numbers (one on AMD,
    whose warps have 64 lanes)."""
    block = max(2048, columns)
    return Launch(block, warps=min(block // 512, most_warps))


SWIGLU = rows(2048)
RMS_NORM_PARTIALS = 512  # Rows of weight gradients, one per program: enough to fill a GPU, few beside the tokens.
