# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportAttributeAccessIssue=false
"""`ensemble_kl` on a GPU: one kernel, one program per token, which reads the token's R rows of logits tile by tile.

Shapes: N tokens, V vocabulary, S students, K teachers, R = S + K streams. A tile is [LANES, VEC]: VEC neighbouring
logits (16 bytes) per lane, so that every sum over a tile stays inside a thread until the row is done.

Three phases, of which a launch runs the ones it needs; `ensemble_kl_kernel` says what each reads and leaves behind.

    statistics   per stream the largest logit m and Σ exp((x − m) / T), online; per student the same sum at T = 1
    losses       Σ p·f(u), f(u) = u − 1 + e^{−u} >= 0, u = log p − log q from differences of logits (see reference.py)
    gradients    per student i, with a = d/d ce_i and c_j = d/d kl_ij,
                     a·(softmax(x_i) − onehot) + (1/T)·Σ_j c_j·g_ij
                     forward  g_ij = p_i − p_j
                     reverse  g_ij = p_i·(u_ij − E_i[u_ij])
                     jsd      g_ij = ½·p_i·(v_ij − E_i[v_ij]),    v_ij = log p_i − log ((p_i + p_j) / 2)

E_i is the mean under p_i. A shift that a row shares drops out of u − E[u], so for "reverse" T·u is taken to be x_i − x_j,
whose mean is gathered with the statistics. So losses and gradients come from one pass after the statistics; only "jsd"
needs the losses' pass finished before the gradients' begins. More than 4 students take a launch for each.

Bytes of logits and gradients per (token, vocabulary) element, 2-byte storage, where the row is read again in each pass:

    losses alone 4R    gradients alone 2(R + S)    both 2(2R + S), "jsd" or S > 4 2(3R + S)

and where it stays on chip (`Launch.block` >= V): 2R, 2(R + S), 2(R + S). Later passes run over the row backwards, so
that they begin with what the caches still hold.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.ops.ensemble_kl.reference import EDGE as _EDGE
from kernels.ops.ensemble_kl.reference import FLOOR as _FLOOR
from kernels.ops.ensemble_kl.reference import INFINITE as _INFINITE
from kernels.registration import op

EDGE = tl.constexpr(_EDGE)
FLOOR = tl.constexpr(_FLOOR)
INFINITE = tl.constexpr(_INFINITE)
LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _put(items, index: tl.constexpr, value):
    """The tuple with items[index] replaced."""
    return items[:index] + (value,) + items[index + 1 :]


@triton.jit
def _repeat(value, times: tl.constexpr):
    items = ()
    for _ in tl.static_range(times):
        items = items + (value,)
    return items


@triton.jit
def _columns(start, LANES: tl.constexpr, VEC: tl.constexpr, TAKEN: tl.constexpr):
    """TAKEN of the VEC columns of each lane."""
    return start + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, TAKEN)[None, :]


@triton.jit
def _address(base, row, column, strides, r: tl.constexpr, UNIT: tl.constexpr):
    """64-bit: N·V may pass 2³¹, and so may a column's offset where columns are not neighbours."""
    start = base + row.to(tl.int64) * strides[2 * r]
    if UNIT:
        return start + column
    else:
        return start + column.to(tl.int64) * strides[2 * r + 1]


@triton.jit
def _pack(tile, LANES: tl.constexpr, VEC: tl.constexpr):
    """[LANES, VEC / 2] int32 of 16-bit numbers, two to a register: the compiler would keep each in its own."""
    if tile.dtype.primitive_bitwidth == 16:
        first, second = tl.split(tl.reshape(tile.to(tl.int16, bitcast=True), (LANES, VEC // 2, 2)))
        tile = (second.to(tl.int32) << 16) | (first.to(tl.int32) & 0xFFFF)
    return tile


@triton.jit
def _unpack(tile, dtype: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    if dtype.primitive_bitwidth == 16:
        first, second = tile.to(tl.int16).to(dtype, bitcast=True), (tile >> 16).to(tl.int16).to(dtype, bitcast=True)
        tile = tl.reshape(tl.join(first, second), (LANES, VEC))
    return tile


@triton.jit
def _load(
    logits,
    strides,
    row,
    block,
    width,
    R: tl.constexpr,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    POLICY: tl.constexpr,
):
    """R tiles, packed."""
    column = _columns(block * LANES * VEC, LANES, VEC, VEC)
    tiles = ()
    for r in tl.static_range(R):
        address = _address(logits[r], row, column, strides, r, UNIT)
        tile = tl.load(address, mask=column < width, other=float("-inf"), eviction_policy=POLICY)
        tiles = tiles + (_pack(tile, LANES, VEC),)
    return tiles


@triton.jit
def _load_row(
    logits,
    strides,
    row,
    width,
    R: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """BLOCKS × R tiles, packed: the whole row, to stay in registers."""
    tiles = ()
    for block in tl.static_range(BLOCKS):
        tiles = tiles + _load(logits, strides, row, block, width, R, UNIT, LANES, VEC, "evict_first")
    return tiles


@triton.jit
def _pick(tiles, block, R: tl.constexpr, BLOCKS: tl.constexpr):
    """The R tiles of one of BLOCKS blocks: registers have no addresses, so by comparison."""
    picked = ()
    for r in tl.static_range(R):
        tile = tiles[r]
        for k in tl.static_range(1, BLOCKS):
            tile = tl.where(block == k, tiles[k * R + r], tile)
        picked = picked + (tile,)
    return picked


@triton.jit
def _half(tiles, half, R: tl.constexpr, LANES: tl.constexpr):
    """The first or the last half of each lane: no data moves between threads."""
    halves = ()
    for r in tl.static_range(R):
        first, last = tl.split(tl.permute(tl.reshape(tiles[r], (LANES, 2, tiles[r].shape[1] // 2)), (0, 2, 1)))
        halves = halves + (tl.where(half == 0, first, last),)
    return halves


@triton.jit
def _widen(
    tiles,
    logits,
    column,
    vocabulary,
    floor,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Unpacked, fp32. −inf, and what lies past the vocabulary, is `floor`, so that differences are never NaN."""
    wide = ()
    for r in tl.static_range(R):
        tile = _unpack(tiles[r], logits[r].dtype.element_ty, LANES, VEC).to(tl.float32)
        if PADDED:
            tile = tl.where(column < vocabulary, tile, floor)
        wide = wide + (tl.maximum(tile, floor, propagate_nan=tl.PropagateNan.ALL),)
    return wide


@triton.jit
def _part(
    raw,
    logits,
    block,
    part,
    vocabulary,
    floor,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Columns and fp32 tiles of one of 1, 2, 4 or 8 parts of a block."""
    PACKED: tl.constexpr = min(PARTS, 4)  # cuts of the packed tiles: pairs of 16-bit numbers stay together
    if PACKED > 1:
        raw = _half(raw, part * 2 // PARTS, R, LANES)
    if PACKED > 2:
        raw = _half(raw, part * 4 // PARTS % 2, R, LANES)
    column = _columns(block * (LANES * VEC) + part * PACKED // PARTS * (VEC // PACKED), LANES, VEC, VEC // PACKED)
    tiles = _widen(raw, logits, column, vocabulary, floor, R, PADDED, LANES, VEC // PACKED)
    if PARTS > PACKED:
        tiles = _half(tiles, part % 2, R, LANES)
        column = _columns(block * (LANES * VEC) + part * (VEC // PARTS), LANES, VEC, VEC // PARTS)
    return column, tiles


@triton.jit
def _update(
    tiles,
    top,
    total,
    plain,
    moment,
    temperature,
    S: tl.constexpr,
    R: tl.constexpr,
    TEMPERED: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Online, per lane: the largest logit, Σ exp((x − top) / T), that sum at T = 1, and Σ exp((x_i − top) / T)·(x_i − x_j)."""
    scale = LOG2_E / temperature
    new_top, new_total, new_plain = (), (), ()
    for r in tl.static_range(R):
        higher = tl.maximum(top[r], tl.max(tiles[r], axis=1))
        below = tiles[r] - higher[:, None]
        e = tl.exp2(below * scale)
        fade = tl.exp2((top[r] - higher) * scale)
        new_top = new_top + (higher,)
        new_total = new_total + (total[r] * fade + tl.sum(e, axis=1),)
        if r < S:
            if TEMPERED:
                faded = plain[r] * tl.exp2((top[r] - higher) * LOG2_E)
                new_plain = new_plain + (faded + tl.sum(tl.exp2(below * LOG2_E), axis=1),)
            if MOMENTS:
                for j in tl.static_range(R):
                    if j != r:
                        step = tl.sum(e * (tiles[r] - tiles[j]), axis=1)
                        moment = _put(moment, r * R + j, moment[r * R + j] * fade + step)
    return new_top, new_total, new_plain, moment


@triton.jit
def _softmax(tiles, top, total, temperature, R: tl.constexpr):
    scale = LOG2_E / temperature
    p = ()
    for r in tl.static_range(R):
        p = p + (tl.exp2((tiles[r] - top[r]) * scale) * (1 / total[r]),)
    return p


@triton.jit
def _log_ratio(x, y, x_top, y_top, x_log, y_log, temperature):
    """log p − log q, whose error is one number for the whole row, but for the last rounding."""
    return (x - y) * (1 / temperature) - ((x_top - y_top) / temperature + (x_log - y_log))


@triton.jit
def _kl_both_ways(u, p, q):
    """p·f(u) and q·f(−u), the terms of KL(p ‖ q) and KL(q ‖ p), given u = log p − log q."""
    square = u * u
    even = square * (1 / 2 + square * (1 / 24 + square * (1 / 720)))  # cosh u − 1
    odd = u * square * (1 / 6 + square * (1 / 120))  # sinh u − u
    near = tl.abs(u) < EDGE
    # not p·u − (p − q): that difference would be shared with the gradient's, and R² of them stay in registers
    return tl.where(near, p * (even - odd), p * (u - 1) + q), tl.where(near, q * (even + odd), p - q * (u + 1))


@triton.jit
def _to_mean(u):
    """v = log p − log m and w = log q − log m, m = (p + q) / 2, given u = log p − log q; and v·p + w·q over m near 0.

    With h = u / 2: v, w = ±h − ln cosh h and v·p + w·q = 2m·(h·tanh h − ln cosh h), as p, q = m·(1 ± tanh h).
    """
    square = u * u * (1 / 4)
    log_cosh = square * (1 / 2 - square * (1 / 12 - square * (1 / 45 - square * (17 / 2520))))
    larger = -LN_2 * tl.log2(tl.exp2(-tl.abs(u) * LOG2_E) * (1 / 2) + 1 / 2)
    # Already here the series: the logarithm, of what is near 1, errs by a rounding of 1, large beside |u| / 2.
    larger = tl.where(tl.abs(u) < 1 / 2, tl.abs(u) * (1 / 2) - log_cosh, larger)
    series = square * (1 - square * (1 / 2 - square * (2 / 9 - square * (17 / 180))))
    return larger + tl.minimum(u, 0.0), larger - tl.maximum(u, 0.0), series


@triton.jit
def _add_losses(
    losses,
    means,
    tiles,
    p,
    top,
    logs,
    temperature,
    S: tl.constexpr,
    R: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    SWEEP: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    """Per lane, the divergences' sums; for "jsd" 2·kl, in losses[i, j > i] alone, and Σ p·v in `means`."""
    for i in tl.static_range(S):
        for j in tl.static_range(i + 1, R):
            if (i + j) % SWEEPS == SWEEP:
                u = _log_ratio(tiles[i], tiles[j], top[i], top[j], logs[i], logs[j], temperature)
                if DIVERGENCE == "jsd":
                    v, w, series = _to_mean(u)
                    pv, pw = p[i] * v, p[j] * w
                    term = tl.where(tl.abs(u) < EDGE, (p[i] + p[j]) * (1 / 2) * series, pv + pw)
                    losses = _put(losses, i * R + j, losses[i * R + j] + tl.sum(term, axis=1))
                    means = _put(means, i * R + j, means[i * R + j] + tl.sum(pv, axis=1))
                    if j < S:
                        means = _put(means, j * R + i, means[j * R + i] + tl.sum(pw, axis=1))
                else:
                    away, back = _kl_both_ways(u, p[i], p[j])
                    if DIVERGENCE == "forward":
                        away, back = back, away
                    losses = _put(losses, i * R + j, losses[i * R + j] + tl.sum(away, axis=1))
                    if j < S:
                        losses = _put(losses, j * R + i, losses[j * R + i] + tl.sum(back, axis=1))
    return losses, means


@triton.jit
def _ce_coefficients(weight, strides, row, on, S: tl.constexpr, CE: tl.constexpr):
    """a: S numbers, d/d ce."""
    a = _repeat(0.0, S)
    for i in tl.static_range(S):
        if CE and weight is not None:
            place = weight + i * strides[0] + row.to(tl.int64) * strides[1]
            a = _put(a, i, tl.where(on, tl.load(place).to(tl.float32), 0.0))
    return a


@triton.jit
def _kl_coefficients(weight, strides, scale, row, on, S: tl.constexpr, R: tl.constexpr, KL: tl.constexpr):
    """c: S × R numbers, d/d kl times what all gradients are multiplied by."""
    c = _repeat(0.0, S * R)
    for i in tl.static_range(S):
        for j in tl.static_range(R):
            if KL and j != i:
                place = weight + i * strides[0] + j * strides[1] + row.to(tl.int64) * strides[2]
                c = _put(c, i * R + j, tl.where(on, tl.load(place).to(tl.float32) * scale, 0.0))
    return c


@triton.jit
def _weighted_means(means, c, S: tl.constexpr, R: tl.constexpr):
    """Σ_j c_ij·E_i[v_ij]: +inf where a logit of −inf was met, so that no gradient is made up."""
    sums = ()
    for i in tl.static_range(S):
        total = 0.0
        for j in tl.static_range(R):
            if j != i:
                mean = tl.where(means[i * R + j] > INFINITE, float("inf"), means[i * R + j])
                # a fused multiply-add, as in `_gradients`: rounded otherwise, the two would not cancel in a sure row
                total += c[i * R + j] * tl.where(c[i * R + j] == 0, 0.0, mean)
        sums = sums + (total,)
    return sums


@triton.jit
def _gradients(
    tiles,
    p,
    top,
    logs,
    plain,
    means,
    a,
    c,
    temperature,
    S: tl.constexpr,
    R: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    KL: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """S tiles, but for −a at the label. `means` are those of `_weighted_means`."""
    tilts = _repeat(tl.zeros_like(tiles[0]), S)  # Σ_j c_ij·p_i·v_ij
    if KL and DIVERGENCE != "forward":
        for i in tl.static_range(S):
            for j in tl.static_range(i + 1, R):
                if DIVERGENCE == "jsd":
                    u = _log_ratio(tiles[i], tiles[j], top[i], top[j], logs[i], logs[j], temperature)
                    v, w, _ = _to_mean(u)
                else:
                    v = tiles[i] - tiles[j]
                    w = -v
                # p first: where v is huge, a logit being −inf, p is 0 or the gradient does not exist
                tilts = _put(tilts, i, tilts[i] + (c[i * R + j] * p[i]) * v)
                if j < S:
                    tilts = _put(tilts, j, tilts[j] + (c[j * R + i] * p[j]) * w)
    gradients = ()
    for i in tl.static_range(S):
        if TEMPERED:
            gradient = a[i] * (tl.exp2((tiles[i] - top[i]) * LOG2_E) * (1 / plain[i]))
        else:
            gradient = a[i] * p[i]
        if KL:
            if DIVERGENCE == "forward":
                for j in tl.static_range(R):
                    if j != i:
                        gradient += c[i * R + j] * (p[i] - p[j])
            else:
                gradient += tilts[i] - p[i] * means[i]
        gradients = gradients + (gradient,)
    return gradients


@triton.jit
def _store(gradients, places, strides, row, column, width, label, a, S: tl.constexpr, UNIT: tl.constexpr):
    for i in tl.static_range(S):
        if places[i] is not None:
            gradient = tl.where(column == label, gradients[i] - a[i], gradients[i])
            address = _address(places[i], row, column, strides, i, UNIT)
            tl.store(address, gradient.to(places[i].dtype.element_ty), mask=column < width)


@triton.jit
def _store_loss(place, value):
    """+inf where a logit of −inf was met."""
    tl.store(place, tl.where(value > INFINITE, float("inf"), value))


@triton.jit
def ensemble_kl_kernel(
    logits,
    strides,
    gradients,
    gradient_strides,
    targets,
    ce_rows,
    kl_rows,
    ce,
    kl,
    statistics,
    mean_ratios,
    ce_weight,
    ce_weight_strides,
    kl_weight,
    kl_weight_strides,
    kl_scale,
    tokens,
    vocabulary,
    width,
    temperature,
    S: tl.constexpr,
    R: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LOSSES: tl.constexpr,
    GRADIENTS: tl.constexpr,
    TEMPERED: tl.constexpr,
    UNIT: tl.constexpr,
    PADDED: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    SWEEPS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Losses of one row, or their gradients, or both.

    Args:
        logits: R pointers. strides: R × (row, column).
        gradients: S pointers, None where not wanted; in place of the logits is allowed. gradient_strides: S × (row, column).
        targets: [N], or None: no CE. ce_rows, kl_rows: [N] bool, the rows in which CE and KL count; None: every row.
        ce [S, N], kl [S, R, N]: the losses, contiguous; written if LOSSES. kl is None where no divergence is wanted.
        statistics [2R + S, N]: m, Σ at T, Σ at 1; mean_ratios [S, R, N]: E_i[x_i − x_j] for "reverse", E_i[v_ij] for
            "jsd". Written (if not None) with LOSSES, read without.
        ce_weight, kl_weight: d/d ce and d/d kl, the latter to be multiplied by kl_scale; any strides; None: zeros.
        vocabulary: V. width: columns up to which reading and writing is allowed, above V if PADDED: those in between
            may hold anything and their gradient is 0.
        UNIT: every column stride is 1. RESIDENT: LANES·VEC >= width, and each logit is read once.
    """
    row = tl.program_id(0)
    CE: tl.constexpr = targets is not None
    KL: tl.constexpr = R > 1 and (kl is not None or kl_weight is not None)
    MOMENTS: tl.constexpr = KL and DIVERGENCE == "reverse"
    MEANS: tl.constexpr = KL and DIVERGENCE == "jsd"
    SPLIT: tl.constexpr = MEANS and LOSSES and GRADIENTS
    PARTS_OF_UPDATE: tl.constexpr = PARTS if MOMENTS and S > 4 else 1  # each fades all that is summed so far
    BLOCK: tl.constexpr = LANES * VEC
    blocks = tl.cdiv(width, BLOCK)

    ce_on = tl.load(ce_rows + row) != 0 if CE else False
    kl_on = KL
    if KL and kl_rows is not None:
        kl_on = tl.load(kl_rows + row) != 0

    if ce_on or kl_on:
        floor = FLOOR * tl.minimum(temperature, 1.0)
        label = -1
        label_logits = ()
        if CE:
            label = tl.load(targets + row, mask=ce_on, other=-1).to(tl.int32)
            for i in tl.static_range(S if LOSSES else 0):  # read before a gradient is written over it
                address = _address(logits[i], row, label, strides, i, UNIT)
                label_logits = label_logits + (tl.load(address, mask=ce_on, other=0.0).to(tl.float32),)
        nothing = tl.zeros((LANES,), tl.float32)

        if RESIDENT:
            kept = _load_row(logits, strides, row, width, R, UNIT, BLOCKS, LANES, VEC)
        top, total, plain, means = (), (), (), _repeat(0.0, S * R)
        if LOSSES:
            tops, totals = _repeat(nothing + floor / 2, R), _repeat(nothing, R)
            plains, moments = _repeat(nothing, S if TEMPERED else 0), _repeat(nothing, S * R if MOMENTS else 0)
            for block in range(blocks):
                if RESIDENT:
                    raw = _pick(kept, block, R, BLOCKS)
                else:
                    raw = _load(logits, strides, row, block, width, R, UNIT, LANES, VEC, "evict_last")
                for part in range(PARTS_OF_UPDATE):
                    _, tiles = _part(
                        raw, logits, block, part, vocabulary, floor, R, PADDED, LANES, VEC, PARTS_OF_UPDATE
                    )
                    tops, totals, plains, moments = _update(
                        tiles, tops, totals, plains, moments, temperature, S, R, TEMPERED, MOMENTS
                    )
            for r in tl.static_range(R):
                highest = tl.max(tops[r], axis=0)
                share = tl.exp2((tops[r] - highest) * (LOG2_E / temperature))
                top = top + (highest,)
                total = total + (tl.sum(totals[r] * share, axis=0),)
                if r < S:
                    if TEMPERED:
                        plain = plain + (tl.sum(plains[r] * tl.exp2((tops[r] - highest) * LOG2_E), axis=0),)
                    if MOMENTS:
                        for j in tl.static_range(R):
                            if j != r:
                                mean = tl.sum(moments[r * R + j] * share, axis=0) / total[r]
                                # refined once, by what the sums over lanes have rounded off
                                rest = (moments[r * R + j] - mean * totals[r]) * share
                                means = _put(means, r * R + j, mean + tl.sum(rest, axis=0) / total[r])
            if statistics is not None:
                for r in tl.static_range(R):
                    tl.store(statistics + r * tokens + row, top[r])
                    tl.store(statistics + (R + r) * tokens + row, total[r])
                for i in tl.static_range(S if TEMPERED else 0):
                    tl.store(statistics + (2 * R + i) * tokens + row, plain[i])
                if MOMENTS:
                    for k in tl.static_range(S * R):
                        tl.store(mean_ratios + k * tokens + row, means[k])
            if CE:
                for i in tl.static_range(S):
                    loss = (top[i] - label_logits[i]) + LN_2 * tl.log2(plain[i] if TEMPERED else total[i])
                    _store_loss(ce + i * tokens + row, tl.where(ce_on, loss, 0.0))
        else:
            for r in tl.static_range(R):
                top = top + (tl.load(statistics + r * tokens + row),)
                total = total + (tl.load(statistics + (R + r) * tokens + row),)
            for i in tl.static_range(S if TEMPERED else 0):
                plain = plain + (tl.load(statistics + (2 * R + i) * tokens + row),)
            if MEANS or MOMENTS:
                for k in tl.static_range(S * R):
                    means = _put(means, k, tl.load(mean_ratios + k * tokens + row))
        logs = ()
        for r in tl.static_range(R):
            logs = logs + (LN_2 * tl.log2(total[r]),)

        a, c, weighted = _repeat(0.0, S), _repeat(0.0, S * R), _repeat(0.0, S)
        scale = kl_scale / temperature * (0.5 if DIVERGENCE == "jsd" else 1.0)
        if DIVERGENCE == "reverse":
            scale = scale / temperature
        if GRADIENTS and not SPLIT:
            a = _ce_coefficients(ce_weight, ce_weight_strides, row, ce_on, S, CE)
            c = _kl_coefficients(kl_weight, kl_weight_strides, scale, row, kl_on, S, R, KL)
            weighted = _weighted_means(means, c, S, R)

        if KL or GRADIENTS:
            for sweep in tl.static_range(SWEEPS if LOSSES else 1):
                losses = _repeat(nothing, S * R if LOSSES and KL else 0)
                sums = _repeat(nothing, S * R if LOSSES and MEANS else 0)
                for step in range(blocks):
                    block = blocks - 1 - step
                    if RESIDENT:
                        raw = _pick(kept, block, R, BLOCKS)
                    else:
                        raw = _load(logits, strides, row, block, width, R, UNIT, LANES, VEC, "evict_first")
                    for part in range(PARTS):
                        column, tiles = _part(raw, logits, block, part, vocabulary, floor, R, PADDED, LANES, VEC, PARTS)
                        p = _softmax(tiles, top, total, temperature, R)
                        if LOSSES and KL:
                            losses, sums = _add_losses(
                                losses, sums, tiles, p, top, logs, temperature, S, R, DIVERGENCE, sweep, SWEEPS
                            )
                        if GRADIENTS and not SPLIT:
                            made = _gradients(
                                tiles, p, top, logs, plain, weighted, a, c, temperature, S, R, DIVERGENCE, KL, TEMPERED
                            )
                            _store(made, gradients, gradient_strides, row, column, width, label, a, S, UNIT)
                if LOSSES and KL:
                    for i in tl.static_range(S):
                        for j in tl.static_range(R):
                            if j != i and (i + j) % SWEEPS == sweep:
                                if DIVERGENCE != "jsd":
                                    loss = tl.sum(losses[i * R + j], axis=0)
                                elif i < j:
                                    loss = tl.sum(losses[i * R + j], axis=0) / 2
                                else:
                                    loss = tl.sum(losses[j * R + i], axis=0) / 2
                                if MEANS:
                                    means = _put(means, i * R + j, tl.sum(sums[i * R + j], axis=0))
                                _store_loss(kl + (i * R + j) * tokens + row, tl.where(kl_on, loss, 0.0))
        if LOSSES and KL:
            for i in tl.static_range(S):
                tl.store(kl + (i * R + i) * tokens + row, 0.0)
            if MEANS and mean_ratios is not None:
                for k in tl.static_range(S * R):
                    tl.store(mean_ratios + k * tokens + row, means[k])
        if SPLIT:
            a = _ce_coefficients(ce_weight, ce_weight_strides, row, ce_on, S, CE)
            c = _kl_coefficients(kl_weight, kl_weight_strides, scale, row, kl_on, S, R, KL)
            weighted = _weighted_means(means, c, S, R)
            for block in range(blocks):
                if RESIDENT:
                    raw = _pick(kept, block, R, BLOCKS)
                else:
                    raw = _load(logits, strides, row, block, width, R, UNIT, LANES, VEC, "evict_first")
                for part in range(PARTS):
                    column, tiles = _part(raw, logits, block, part, vocabulary, floor, R, PADDED, LANES, VEC, PARTS)
                    p = _softmax(tiles, top, total, temperature, R)
                    made = _gradients(
                        tiles, p, top, logs, plain, weighted, a, c, temperature, S, R, DIVERGENCE, KL, TEMPERED
                    )
                    _store(made, gradients, gradient_strides, row, column, width, label, a, S, UNIT)
    else:
        if LOSSES:
            for i in tl.static_range(S):
                if CE:
                    tl.store(ce + i * tokens + row, 0.0)
                for j in tl.static_range(R if KL else 0):
                    tl.store(kl + (i * R + j) * tokens + row, 0.0)
        if GRADIENTS:
            for block in range(tl.cdiv(width, BLOCK)):
                column = _columns(block * BLOCK, LANES, VEC, VEC)
                for i in tl.static_range(S):
                    if gradients[i] is not None:
                        address = _address(gradients[i], row, column, gradient_strides, i, UNIT)
                        tl.store(address, tl.zeros_like(column).to(tl.float32), mask=column < width)


def arguments(
    logits: Sequence[Tensor],
    *,
    students: int,
    targets: Tensor | None,
    ce_rows: Tensor | None,
    kl_rows: Tensor | None,
    losses: tuple[Tensor, Tensor | None] | None = None,
    saved: tuple[Tensor, Tensor | None] | None = None,
    gradients: Sequence[Tensor | None] | None = None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    kl_scale: float = 1.0,
    vocabulary: int | None = None,
    temperature: float,
    divergence: str,
    lanes: int,
    paired: bool = False,
) -> tuple[list[Any], dict[str, Any]]:
    """What `ensemble_kl_kernel` is called with: its arguments in order, and its constants and launch options.

    Args:
        logits: R tensors [N, W]. students: S. targets, ce_rows, kl_rows, kl_scale: as in the kernel.
        losses: (ce [S, N], kl [S, R, N] or None) to be written; None: gradients alone.
        saved: (statistics, mean_ratios), to be written with losses, to be read without.
        gradients: S tensors [N, W] or None; None: losses alone.
        weights: d/d ce [S, N] and d/d kl [S, R, N], expanded as they may be; a kl weight of None leaves streams apart.
        vocabulary: V; None: W.
        lanes, paired: as in `launch.ensemble_kl`.
    """
    (tokens, width), streams = logits[0].shape, len(logits)
    vocabulary = width if vocabulary is None else vocabulary
    ce_weight, kl_weight = weights
    if losses is not None and losses[1] is None:
        temperature = 1.0  # as there is nothing to temper
    sizes = [x.element_size() for x in logits]
    tile = launch.ensemble_kl(
        width,
        students,
        streams,
        min(sizes),
        lanes,
        divergence=divergence,
        mixed=len({*sizes}) > 1,
        paired=paired,
    )
    vector = 16 // min(sizes)
    written = [] if gradients is None else [g for g in gradients if g is not None]
    constants = {
        "S": students,
        "R": streams,
        "DIVERGENCE": divergence,
        "LOSSES": losses is not None,
        "GRADIENTS": gradients is not None,
        "TEMPERED": temperature != 1,
        "UNIT": all(x.stride(1) == 1 for x in (*logits, *written)),
        "PADDED": width != vocabulary,
        "RESIDENT": tile.block >= width,
        "BLOCKS": tile.block // (lanes * tile.warps * vector),
        "PARTS": tile.parts,
        "SWEEPS": tile.sweeps,
        "LANES": lanes * tile.warps,
        "VEC": vector,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    ce, kl = losses or (None, None)
    statistics, mean_ratios = saved or (None, None)
    return [
        tuple(logits),
        _strides(logits),
        None if gradients is None else tuple(gradients),
        None if gradients is None else _strides([logits[0] if g is None else g for g in gradients]),
        targets,
        ce_rows,
        kl_rows,
        ce,
        kl,
        statistics,
        mean_ratios,
        ce_weight,
        None if ce_weight is None else ce_weight.stride(),
        kl_weight,
        None if kl_weight is None else kl_weight.stride(),
        kl_scale,
        tokens,
        vocabulary,
        width,
        temperature,
    ], constants


def _strides(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride())


@functools.cache
def _gpu(device: torch.device) -> dict[str, Any]:
    """What `launch` wants to know of a device."""
    if device.type != "cuda":
        return {"lanes": 32}
    found = torch.cuda.get_device_properties(device)
    return {"lanes": found.warp_size, "paired": torch.version.hip is None and found.major >= 10}


def _launch(logits: Sequence[Tensor], **options: Any) -> None:
    """`arguments` to the kernel, a program per token."""
    if not len(logits[0]):
        return
    positional, constants = arguments(logits, **_gpu(logits[0].device), **options)
    with torch.cuda.device_of(logits[0]):
        ensemble_kl_kernel[(len(logits[0]),)](*positional, **constants)


def loss_and_grad(
    logits: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    targets: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor | None,
    ce_rows: Tensor,
    kl_rows: Tensor,
    *,
    vocabulary: int,
    temperature: float,
    divergence: str,
) -> tuple[Tensor, Tensor | None]:
    """Per-token losses, and the gradient of every student's weighted sum of them, in one launch (two if S > 4).

    The sum is that of `reference.loss_and_grad`: Σ_n [ce_weight[i]·CE_i,n + T²·Σ_j kl_weight[i, j]·KL_ij,n].

    Args:
        logits: R tensors [N, W] of fp32, bf16 or fp16, W >= V; columns from V on are padding and may hold anything.
        gradients: S tensors [N, W] of any of these dtypes to be written, or None where not wanted; the students' logits
            themselves are allowed.
        targets: [N] int64; rows outside `ce_rows` may hold anything.
        ce_weight: [S]. kl_weight: [S, R], or None: no divergence is computed, and teachers' logits are not read.
        ce_rows, kl_rows: [N] bool, the rows that count; the others are 0 in losses and gradients.
        vocabulary: V.

    Returns:
        ce [S, N], kl [S, R, N] (None without `kl_weight`) in nats, unweighted, fp32.
    """
    S, N = len(gradients), len(targets)
    ce, kl, *saved = _allocate(logits, S, divergence)
    pairs = kl_weight is not None and len(logits) > 1
    if not pairs:
        logits, kl = logits[:S], kl.zero_()
    options: dict[str, Any] = {
        "students": S,
        "targets": targets,
        "ce_rows": ce_rows,
        "kl_rows": kl_rows if pairs else None,
        "kl_scale": temperature**2,
        "vocabulary": vocabulary,
        "temperature": temperature,
        "divergence": divergence,
    }
    losses = ce, kl if pairs else None
    made: dict[str, Any] = {
        "gradients": gradients if any(g is not None for g in gradients) else None,
        "weights": (
            ce_weight[:, None].expand(S, N),
            kl_weight[:, :, None].expand(S, -1, N) if pairs and kl_weight is not None else None,
        ),
    }
    if pairs and S > launch.STUDENTS_AT_ONCE:
        _launch(logits, losses=losses, saved=saved, **options)
        if made["gradients"] is not None:
            _launch(logits, saved=saved, **made, **options)
    else:
        _launch(logits, losses=losses, **made, **options)
    return ce, None if kl_weight is None else kl


def ensemble_kl(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ensemble_kl`. Differentiable once.

    Raises:
        ValueError: a stream of float64.
    """
    for r, logits in enumerate(streams):
        if logits.dtype == torch.float64:
            raise ValueError(
                f"stream {r} is {logits.dtype}: the Triton kernel computes in fp32; convert it, or choose"
                " kernels.backend('reference')"
            )
    ce, kl, _, _ = _forward(list(streams), targets, students, float(temperature), divergence, ignore_index)
    return ce, kl


@op("ensemble_kl")
def _forward(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ce, kl, and what the backward wants from the kernel: statistics, mean_ratios."""
    outputs = ce, kl, statistics, mean_ratios = _allocate(streams, students, divergence)
    pairs = len(streams) > 1
    if targets is None:
        ce.zero_()
    if not pairs:
        kl.zero_()
    if pairs or targets is not None:
        rows = None if targets is None else targets != ignore_index
        _launch(
            streams,
            students=students,
            targets=None if targets is None else targets.contiguous(),
            ce_rows=rows,
            kl_rows=rows,
            losses=(ce, kl if pairs else None),
            saved=(statistics, mean_ratios),
            temperature=temperature,
            divergence=divergence,
        )
    return outputs


def _allocate(streams: Sequence[Tensor], students: int, divergence: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S, R, N = students, len(streams), len(streams[0])
    ce = streams[0].new_empty(S, N, dtype=torch.float32)
    return (
        ce,
        ce.new_empty(S, R, N),
        ce.new_empty(2 * R + S, N),
        ce.new_empty((0,) if divergence == "forward" else (S, R, N)),
    )


@_forward.register_fake
def _(
    streams: Sequence[Tensor], targets: Tensor | None, students: int, temperature: float, divergence: str, *_: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate(streams, students, divergence)


@op("ensemble_kl_backward")
def _backward(
    d_ce: Tensor | None,
    d_kl: Tensor | None,
    streams: Sequence[Tensor],
    targets: Tensor | None,
    statistics: Tensor,
    mean_ratios: Tensor,
    wanted: Sequence[bool],
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> list[Tensor]:
    """The gradients of the students wanted, in their order."""
    S, R = len(wanted), len(streams)
    made = _allocate_gradients(streams, wanted)
    rows = None if targets is None else targets != ignore_index
    if d_kl is None or R == 1:  # no divergence takes part, so neither teachers nor temperature do
        sums = statistics[R : R + S] if temperature == 1 or R == 1 else statistics[2 * R :]
        streams, statistics, temperature, d_kl = streams[:S], torch.cat((statistics[:S], sums)), 1.0, None
    if targets is None and d_kl is None:
        return [gradient.zero_() for gradient in made]
    remaining = iter(made)
    _launch(
        streams,
        students=S,
        targets=None if targets is None else targets.contiguous(),
        ce_rows=rows,
        kl_rows=None if d_kl is None else rows,
        saved=(statistics, mean_ratios),
        gradients=[next(remaining) if want else None for want in wanted],
        weights=(d_ce, d_kl),
        temperature=temperature,
        divergence=divergence,
    )
    return made


def _allocate_gradients(streams: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, want in zip(streams, wanted, strict=False) if want
    ]


@_backward.register_fake
def _(d_ce: Tensor | None, d_kl: Tensor | None, streams: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    wanted: Sequence[bool] = rest[3]
    return _allocate_gradients(streams, wanted)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    streams, targets, students, *ctx.options = inputs
    ctx.wanted = [logits.requires_grad for logits in streams[:students]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*streams, targets, *output[2:])


def _differentiate(ctx: Any, d_ce: Tensor | None, d_kl: Tensor | None, *_: None) -> tuple:
    *streams, targets, statistics, mean_ratios = ctx.saved_tensors
    made = iter(_backward(d_ce, d_kl, streams, targets, statistics, mean_ratios, ctx.wanted, *ctx.options))
    gradients = [next(made) if want else None for want in ctx.wanted]
    return gradients + [None] * (len(streams) - len(ctx.wanted)), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
