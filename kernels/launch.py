"""How every Triton kernel is launched: one frozen `Launch`, and one short rule per op that chooses it.

Each line of a rule is justified by `benchmarks/audit.py` (registers, spills, load width, occupancy) or, where a GPU was
at hand, by `benchmarks/ops.py`. Nothing here looks at a device: a rule sees shapes and how many threads a warp has.

Shapes: V vocabulary, S students, K teachers, R = S + K streams.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: `block` elements of a row at a time by `warps` warps."""

    block: int
    warps: int
    parts: int = 1  # into which a thread cuts its share of a block, to be worked on one after the other
    sweeps: int = 1  # over a row, for the sums that do not fit in registers together


def blocks(elements: int, block: int) -> int:
    """So many blocks hold the elements. (Triton's own functions for this are kernels' too: called from Python, one of
    them takes as long as a small kernel.)"""
    return -(-elements // block)


def power_of_2(n: int) -> int:
    """The smallest that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


STUDENTS_AT_ONCE = 4  # whose losses and gradients come from one launch: with more, registers spill


def ensemble_kl(
    width: int,
    students: int,
    streams: int,
    itemsize: int,
    lanes: int,
    *,
    divergence: str,
    mixed: bool,
    paired: bool = False,
) -> Launch:
    """128 threads with 16 bytes of each stream at a time, 256 where there is little to hold; or, where 128 threads can
    hold all of a row, `block` >= width.

    More threads could hold longer rows: fewer bytes, but on an H100 1.2 to 1.3 times the time of reading the row again,
    for want of other programs beside them (LOG.md, 2026-11-22). There a tile in one part is fastest too, but without
    `parts` and `sweeps` registers spill: with S students a thread holds S·(R − 1) sums. AMD has twice the registers for
    a thread and needs no sweeps.

    Args:
        width: columns, padding included. itemsize: bytes of a logit.
        lanes: threads of a warp: 64 on AMD, else 32.
        mixed: whether streams differ in dtype: then, as for divergences other than "forward", no row is kept on chip.
        paired: whether fp32 is computed on pairs of registers, as on NVIDIA from sm_100 on, which takes more of them.
    """
    vector = 16 // itemsize
    plain = divergence == "forward" and not mixed
    if plain and students <= 2 and streams <= 3:
        tile = 128 * vector
        if width <= 4 * tile:  # 64 bytes per stream and thread
            return Launch(-(-width // tile) * tile, 128 // lanes)
        return Launch(256 * vector, 256 // lanes)
    if students > STUDENTS_AT_ONCE:  # one element at a time, and half of the sums
        return Launch(128 * vector, 128 // lanes, parts=vector, sweeps=2 if lanes == 32 else 1)
    parts = 1 if itemsize == 4 or streams < 4 else 2 if students == 1 else 4
    if plain and streams <= 5 and students * (streams - 1) <= (6 if paired or lanes == 64 else 12):
        parts = 1
    return Launch(128 * vector, 128 // lanes, parts=parts)


def ensemble_kl_top_k(itemsize: int, lanes: int) -> Launch:
    """128 threads with 16 bytes of the gradient each (`itemsize`: of its elements, or of the logits' without it)."""
    return Launch(128 * (16 // itemsize), 128 // lanes)


def rms_norm(columns: int) -> Launch:
    """Whole rows: several if they are short, 16 elements per thread, which is two 128-bit loads of 16-bit numbers."""
    block = max(2048, columns)
    return Launch(block, warps=min(block // 512, 32))


RMS_NORM_PARTIALS = 512  # rows of weight gradients, one per program: enough to fill a GPU, few beside the tokens


def rotary(columns: int) -> Launch:
    """Whole tokens, several if they are small, 16 pairs per thread; `columns` is the pairs in all heads of a token."""
    block = max(2048, columns)
    return Launch(block, warps=min(block // 512, 16))


def swiglu() -> Launch:
    """16 elements per thread: two 128-bit loads of each input in 16 bits (on AMD, with its 64 lanes to a warp, one)."""
    return Launch(2048, warps=4)
