# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportCallIssue=false
"""The divergence from a teacher known by its k most probable tokens (`top_k.py`) on a GPU, with one program per token.

Shapes: N tokens, V vocabulary, W columns of a row, padding included, S students, R streams; n tokens of a chunk.

The kernel replaces the student's logits of the k tokens by −inf, and restores them at the end. So a sweep over the row
sees only the tokens of the tail. Its sum is Q_t, to full precision however confident the student is, and no column is
compared with k indices. The k + 1 buckets then fit in one tile, with the tail in slot k.

With g of `top_k.py` and r = softmax over the tail's tokens, q_v·g_t = r_v·(Q_t·g_t) there. So nothing is divided by
Q_t, which may underflow. A (token, vocabulary) element costs 4 bytes, and 4 + 2·(bytes of the gradient's dtype) for the
second sweep, which only the gradient needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.triton import gpu_of
from kernels.ops.ensemble_kl.triton_kernel import (
    EDGE,
    FLOOR,
    INFINITE,
    LOG2_E,
    _address,
    _kl_both_ways,
    _load,
    _part,
    _softmax,
    _store_loss,
    _to_mean,
    _update,
)
from kernels.ops.linear_ensemble_kl import TopK


@triton.jit
def _centred(q, ratio):
    """Returns q·(ratio − E[ratio]), the gradient except for a factor. E[ratio] equals the divergence, but has the same
    errors as ratio, so that those which the row shares drop out. It is infinite where a logit was −inf."""
    mean = tl.sum(q * ratio, axis=0)
    return tl.where(q == 0, 0.0, q * (ratio - tl.where(mean > INFINITE, float("inf"), mean)))


@triton.jit(do_not_specialize=["first", "pair"])
def top_k_kernel(
    logits,
    strides,
    gradient,
    log_prob,
    index,
    tail,
    kl_rows,
    kl_weight,
    kl,
    first,
    pair,
    tokens,
    k,
    vocabulary,
    width,
    temperature,
    DIVERGENCE: tl.constexpr,
    PADDED: tl.constexpr,
    BUCKETS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Computes one student's divergence from one teacher in one row, and adds its gradient to that of the row's logits.

    Args:
        logits: A tuple of one pointer to fp32 [n, W]. strides: Its (row, column), and the gradient's.
        gradient: [n, W], to be added to. None: it is unwanted.
        log_prob, index [N, k], tail [N], kl_rows [N], kl_weight [S, R], kl [S, R, N]: As in `linear_ensemble_kl`.
        first: The chunk's first token among the N. pair: i·R + r of student i and teacher r.
    """
    row = tl.program_id(0)
    token = first + row
    kl_place = kl + pair.to(tl.int64) * tokens + token
    if tl.load(kl_rows + token) != 0:
        floor = FLOOR * tl.minimum(temperature, 1.0)
        slot = tl.arange(0, BUCKETS)
        is_known, is_tail = slot < k, slot == k
        place = token.to(tl.int64) * k + slot
        column = tl.load(index + place, mask=is_known, other=0)
        is_inside = is_known & (column >= 0) & (column < vocabulary)  # Elsewhere NaN is read and nothing written.
        address = _address(logits[0], row, column, strides, 0, True)
        known_logits = tl.load(address, mask=is_inside, other=tl.where(is_known, float("nan"), float("-inf")))
        if gradient is not None:
            gradient_address = _address(gradient, row, column, strides, 0, True)
            before = tl.load(gradient_address, mask=is_inside, other=0.0).to(tl.float32)
        tl.debug_barrier()  # Several threads read a small tile, and one of them writes it.
        tl.store(address, float("-inf"), mask=is_inside)
        tl.debug_barrier()

        blocks, end = tl.cdiv(width, LANES * VEC), vocabulary if PADDED else None
        tops, totals = (tl.zeros((LANES,), tl.float32) + floor / 2,), (tl.zeros((LANES,), tl.float32),)
        for block in range(blocks):
            raw = _load(logits, strides, row, block, width, True, LANES, VEC, "evict_last")
            _, tiles = _part(raw, logits, block, 0, end, floor, LANES, VEC, 1)
            tops, totals, _, _ = _update(tiles, tops, totals, (), (), temperature)
        scale = LOG2_E / temperature
        top = tl.max(tops[0], axis=0)
        total = tl.sum(totals[0] * tl.exp2((tops[0] - top) * scale), axis=0)

        # p is the teacher's k + 1 buckets, and q the student's. Both are 0 in the slots behind them.
        tail_p = tl.load(tail + token).to(tl.float32)
        log_p = tl.load(log_prob + place, mask=is_known, other=float("-inf")).to(tl.float32)
        log_p = tl.where(is_tail, tl.log(tail_p), log_p)
        log_p = tl.maximum(log_p, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        p = tl.where(is_tail, tail_p, tl.exp(log_p))
        x = tl.where(is_tail, top, tl.maximum(known_logits, floor, propagate_nan=tl.PropagateNan.ALL))
        mass = tl.where(is_tail, total, 1.0)
        below = (x - tl.max(x, axis=0)) / temperature
        e = mass * tl.exp(below)
        sum_e = tl.sum(e, axis=0)
        q = e / sum_e
        log_q = tl.maximum(below + tl.log(mass / sum_e), FLOOR, propagate_nan=tl.PropagateNan.ALL)
        u = log_q - log_p

        # Where u is small, p·e^u replaces q, or q·e^{−u} p, so that an error of u that the row shares drops out.
        if DIVERGENCE == "forward":
            _, term = _kl_both_ways(u, tl.where(u < 1, p * tl.exp(u), q), p)
            change = q - p
        elif DIVERGENCE == "reverse":
            term, _ = _kl_both_ways(u, q, tl.where(u > -1, q * tl.exp(-u), p))
            change = _centred(q, u)
        else:
            ratio, other_ratio, series = _to_mean(u)
            term = tl.where(tl.abs(u) < EDGE, (p + q) * (1 / 2) * series, q * ratio + p * other_ratio) / 2
            change = _centred(q, ratio) / 2
        _store_loss(kl_place, tl.sum(term, axis=0))

        if gradient is not None:
            weight = tl.load(kl_weight + pair) * temperature
            if weight != 0:  # Else nothing is added, even if the divergence is infinite.
                change = weight * change
                of_tail = tl.sum(tl.where(is_tail, change, 0.0), axis=0)
                divisor = tl.where(total == 0, 1.0, total)  # It is 0 if the tail has no token.
                for step in range(blocks):
                    block = blocks - 1 - step
                    raw = _load(logits, strides, row, block, width, True, LANES, VEC, "evict_first")
                    columns, tiles = _part(raw, logits, block, 0, end, floor, LANES, VEC, 1)
                    (r,) = _softmax(tiles, (top,), (divisor,), temperature)
                    places, inside = _address(gradient, row, columns, strides, 0, True), columns < width
                    so_far = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
                    tl.store(places, (so_far + of_tail * r).to(gradient.dtype.element_ty), mask=inside)
                tl.debug_barrier()
                tl.store(gradient_address, (before + change).to(gradient.dtype.element_ty), mask=is_inside)
        tl.debug_barrier()
        tl.store(address, known_logits, mask=is_inside)
    else:
        tl.store(kl_place, 0.0)


def add_divergence(
    logits_nW: Tensor,
    gradient_nW: Tensor | None,
    teacher: TopK,
    spec: LossSpec,
    kl_SRN: Tensor,
    *,
    first: int,
    pair: tuple[int, int],
    vocabulary: int,
    lanes: int | None = None,
) -> None:
    """Writes the divergence of student i from the teacher, stream r, to kl[i, r], and adds its gradient, times T² and
    the weight, to `gradient_nW`. The logits are overwritten and restored.

    Args:
        logits_nW: fp32, of the n tokens from `first` on. gradient_nW: fp32, bf16 or fp16; None: it is unwanted. Both
            are contiguous.
        teacher, spec, kl_SRN: Of all N tokens, contiguous. `kl_weight` and kl_SRN are fp32. In rows outside `kl_rows`
            the teacher may hold anything. A token outside [0, V) makes its row's loss and gradient NaN.
        pair: (i, r). vocabulary: V. lanes: The threads of a warp. None: those of the logits' device.
    """
    n, width = logits_nW.shape
    lanes = lanes or gpu_of(logits_nW.device).lanes
    narrowest = logits_nW if gradient_nW is None else gradient_nW
    chosen = launch.ensemble_kl_top_k(narrowest.element_size(), lanes)
    with torch.cuda.device_of(logits_nW):
        top_k_kernel[(n,)](
            (logits_nW,),
            logits_nW.stride(),
            gradient_nW,
            *teacher,
            spec.kl_rows,
            spec.kl_weight,
            kl_SRN,
            first,
            pair[0] * kl_SRN.shape[1] + pair[1],
            kl_SRN.shape[2],
            teacher.index.shape[1],
            vocabulary,
            width,
            spec.temperature,
            DIVERGENCE=spec.divergence,
            PADDED=width != vocabulary,
            BUCKETS=launch.power_of_2(teacher.index.shape[1] + 1),
            LANES=lanes * chosen.warps,
            VEC=chosen.block // (lanes * chosen.warps),
            num_warps=chosen.warps,
            num_stages=1,
        )
