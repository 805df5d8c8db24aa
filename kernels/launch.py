"""How every Triton kernel is launched: one frozen `Launch`, and one short rule per op that chooses it.

Each line of a rule is justified by `benchmarks/audit.py` (registers, spills, load width, occupancy) or, where a GPU was
at hand, by `benchmarks/ops.py`. Nothing here looks at a device: a rule sees shapes and an architecture's number.

Shapes: V vocabulary, S students, K teachers, R = S + K streams.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: `block` elements of a row at a time by `warps` warps, loops pipelined `stages` deep."""

    block: int
    warps: int
    stages: int = 1
    parts: int = 1  # into which a thread cuts its share of a block, to be worked on one after the other
    sweeps: int = 1  # over a row, for the sums that do not fit in registers together


def ensemble_kl(width: int, students: int, streams: int, itemsize: int, arch: int, *, keep: bool) -> Launch:
    """16 bytes of each stream per thread at a time, or all of a row: then `block` >= width.

    Without `parts` and `sweeps` registers spill: with S students a thread holds S·(R − 1) sums, and on Blackwell
    (arch 100) the compiler pairs numbers for its two-wide arithmetic, which takes more registers still.

    Args:
        width: columns, padding included. itemsize: bytes of a logit. arch: 90 for compute capability 9.0.
        keep: whether keeping rows in registers was audited for this divergence and mixture of dtypes.
    """
    vector = 16 // itemsize
    if keep and students <= 2 and streams <= 3:
        for warps in (4, 8, 16):
            tile = 32 * warps * vector
            if width <= 4 * tile:  # 64 bytes per stream and thread
                return Launch(-(-width // tile) * tile, warps)
    many = students > 4
    parts = (4 if students >= 4 else 2 if streams >= 4 else 1) if itemsize == 2 else 2 if many else 1
    return Launch(32 * 4 * vector, warps=4, parts=parts, sweeps=4 if many and arch >= 100 else 1)


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
