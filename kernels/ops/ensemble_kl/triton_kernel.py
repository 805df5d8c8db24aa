# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportAttributeAccessIssue=false
"""The kernel of `ensemble_kl` on a GPU. One program per token reads the token's R rows of logits tile by tile.

Shapes: N tokens, V vocabulary, S students, K teachers, R = S + K streams. A tile is [LANES, VEC]: each lane has VEC
neighbouring logits (16 bytes), so that every sum over a tile stays inside a thread until the row is done. In device
functions, arguments in capitals are constants.

There are three phases, and a launch runs those it needs. `ensemble_kl_kernel` says what each reads and writes.

    statistics   per stream the largest logit m and Σ exp((x − m) / T), online; per student the same sum at T = 1
    losses       Σ p·f(u), f(u) = u − 1 + e^{−u} >= 0, u = log p − log q from differences of logits (see reference.py)
    gradients    per student i, with a = d/d ce_i and c_j = d/d kl_ij,
                     a·(softmax(x_i) − onehot) + (1/T)·Σ_j c_j·g_ij
                     forward  g_ij = p_i − p_j
                     reverse  g_ij = p_i·(u_ij − E_i[u_ij])
                     jsd      g_ij = ½·p_i·(v_ij − E_i[v_ij]),    v_ij = log p_i − log ((p_i + p_j) / 2)

E_i is the mean under p_i. A shift that a row shares drops out of u − E[u], so for "reverse" T·u is replaced by
x_i − x_j, whose mean is computed with the statistics. So one pass after the statistics gives losses and gradients. Only
"jsd" must finish the losses' pass before the gradients' pass begins. More than 4 students take a launch for each.

If the row is read again in each pass, a (token, vocabulary) element of 2-byte storage costs these bytes of logits and
gradients:

    losses alone 4R    gradients alone 2(R + S)    both 2(2R + S), "jsd" or S > 4 2(3R + S)

If it stays on chip (`Launch.block` >= V), it costs 2R, 2(R + S) and 2(R + S). Later passes run over the row backwards,
so that they begin with what the caches still hold.
"""

import math

import triton
import triton.language as tl

EDGE = tl.constexpr(0.25)  # Below this |u|, f is computed by its series.
FLOOR = tl.constexpr(-1e38)  # Stands for a logit of −inf, so that differences are never NaN. It is in fp32's range.
INFINITE = tl.constexpr(1e12)  # A loss above this is infinite: losses of finite logits never come near it.
LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _put(items, index, value):
    """Returns the tuple with items[index] replaced."""
    return items[:index] + (value,) + items[index + 1 :]


@triton.jit
def _columns(start, LANES, VEC, TAKEN):
    """Returns the first TAKEN of the VEC columns of each lane."""
    return start + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, TAKEN)[None, :]


@triton.jit
def _address(base, row, column, strides, r, UNIT):
    """Returns 64-bit addresses, because N·V may exceed 2³¹, and so may the offset of a column with a large stride."""
    start = base + row.to(tl.int64) * strides[2 * r]
    if UNIT:
        return start + column
    else:
        return start + column.to(tl.int64) * strides[2 * r + 1]


@triton.jit
def _pack(tile):
    """Returns 16-bit numbers as [LANES, VEC / 2] int32, two to a register. The compiler would give each its own."""
    if tile.dtype.primitive_bitwidth == 16:
        pairs = tl.reshape(tile.to(tl.int16, bitcast=True), (tile.shape[0], tile.shape[1] // 2, 2))
        first, second = tl.split(pairs)
        tile = (second.to(tl.int32) << 16) | (first.to(tl.int32) & 0xFFFF)
    return tile


@triton.jit
def _unpack(tile, dtype):
    if dtype.primitive_bitwidth == 16:
        first, second = tile.to(tl.int16).to(dtype, bitcast=True), (tile >> 16).to(tl.int16).to(dtype, bitcast=True)
        tile = tl.reshape(tl.join(first, second), (tile.shape[0], 2 * tile.shape[1]))
    return tile


@triton.jit
def _load(logits, strides, row, block, width, UNIT, LANES, VEC, POLICY):
    """Returns R tiles, packed."""
    column = _columns(block * LANES * VEC, LANES, VEC, VEC)
    tiles = ()
    for r in tl.static_range(len(logits)):
        address = _address(logits[r], row, column, strides, r, UNIT)
        tile = tl.load(address, mask=column < width, other=float("-inf"), eviction_policy=POLICY)
        tiles = tiles + (_pack(tile),)
    return tiles


@triton.jit
def _read(row_tiles, logits, strides, row, block, width, UNIT, LANES, VEC, POLICY):
    """Returns the R tiles of a block, packed: from `row_tiles` if the row stays on chip, else from memory."""
    if len(row_tiles) > 0:
        R: tl.constexpr = len(logits)
        picked = ()
        for r in tl.static_range(R):
            tile = row_tiles[r]
            for k in tl.static_range(1, len(row_tiles) // R):  # It compares, because registers have no addresses.
                tile = tl.where(block == k, row_tiles[k * R + r], tile)
            picked = picked + (tile,)
        return picked
    else:
        return _load(logits, strides, row, block, width, UNIT, LANES, VEC, POLICY)


@triton.jit
def _half(tile, half):
    """Returns the first or the last half of each lane. No data moves between threads."""
    pair = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    first, last = tl.split(tl.permute(pair, (0, 2, 1)))
    return tl.where(half == 0, first, last)


@triton.jit
def _widen(tiles, logits, column, vocabulary, floor):
    """Returns fp32 tiles. Logits of −inf or past the vocabulary become `floor`, so that differences are never NaN."""
    wide = ()
    for r in tl.static_range(len(tiles)):
        tile = _unpack(tiles[r], logits[r].dtype.element_ty).to(tl.float32)
        if vocabulary is not None:
            tile = tl.where(column < vocabulary, tile, floor)
        wide = wide + (tl.maximum(tile, floor, propagate_nan=tl.PropagateNan.ALL),)
    return wide


@triton.jit
def _part(raw, logits, block, part, vocabulary, floor, LANES, VEC, PARTS):
    """Returns columns and fp32 tiles of one of 1, 2, 4 or 8 parts of a block."""
    PACKED: tl.constexpr = min(PARTS, 4)  # How often packed tiles are cut: pairs of 16-bit numbers stay together.
    if PACKED > 1:
        raw = [_half(tile, part * 2 // PARTS) for tile in raw]
    if PACKED > 2:
        raw = [_half(tile, part * 4 // PARTS % 2) for tile in raw]
    column = _columns(block * (LANES * VEC) + part * PACKED // PARTS * (VEC // PACKED), LANES, VEC, VEC // PACKED)
    tiles = _widen(raw, logits, column, vocabulary, floor)
    if PARTS > PACKED:
        tiles = [_half(tile, part % 2) for tile in tiles]
        column = _columns(block * (LANES * VEC) + part * (VEC // PARTS), LANES, VEC, VEC // PARTS)
    return column, tiles


@triton.jit
def _update(tiles, top, total, plain, moment, temperature):
    """Updates per lane the largest logit, Σ exp((x − top) / T), that sum at T = 1, and Σ exp((x_i − top) / T)·(x_i − x_j).

    The last two are of students alone, and are skipped if `plain` or `moment` is empty.
    """
    R: tl.constexpr = len(tiles)
    scale = LOG2_E / temperature
    new_top, new_total, new_plain = (), (), ()
    for r in tl.static_range(R):
        higher = tl.maximum(top[r], tl.max(tiles[r], axis=1))
        below = tiles[r] - higher[:, None]
        e = tl.exp2(below * scale)
        rescale = tl.exp2((top[r] - higher) * scale)
        new_top = new_top + (higher,)
        new_total = new_total + (total[r] * rescale + tl.sum(e, axis=1),)
        if r < len(plain):
            rescaled = plain[r] * tl.exp2((top[r] - higher) * LOG2_E)
            new_plain = new_plain + (rescaled + tl.sum(tl.exp2(below * LOG2_E), axis=1),)
        if r * R < len(moment):
            for j in tl.static_range(R):
                if j != r:
                    step = tl.sum(e * (tiles[r] - tiles[j]), axis=1)
                    moment = _put(moment, r * R + j, moment[r * R + j] * rescale + step)
    return new_top, new_total, new_plain, moment


@triton.jit
def _softmax(tiles, top, total, temperature):
    scale = LOG2_E / temperature
    p = ()
    for r in tl.static_range(len(tiles)):
        p = p + (tl.exp2((tiles[r] - top[r]) * scale) * (1 / total[r]),)
    return p


@triton.jit
def _log_ratio(x, y, x_top, y_top, x_log, y_log, temperature):
    """Returns log p − log q. Except for the last rounding, its error is the same for the whole row."""
    return (x - y) * (1 / temperature) - ((x_top - y_top) / temperature + (x_log - y_log))


@triton.jit
def _kl_both_ways(u, p, q):
    """Returns p·f(u) and q·f(−u), the terms of KL(p ‖ q) and KL(q ‖ p), given u = log p − log q."""
    square = u * u
    even = square * (1 / 2 + square * (1 / 24 + square * (1 / 720)))  # cosh u − 1
    odd = u * square * (1 / 6 + square * (1 / 120))  # sinh u − u
    near = tl.abs(u) < EDGE
    # It is not p·u − (p − q), because the gradient would share that difference, and R² of them would stay in registers.
    return tl.where(near, p * (even - odd), p * (u - 1) + q), tl.where(near, q * (even + odd), p - q * (u + 1))


@triton.jit
def _to_mean(u):
    """Returns v = log p − log m, w = log q − log m and, near u = 0, (v·p + w·q) / m, given u = log p − log q.

    Here m = (p + q) / 2. With h = u / 2: v, w = ±h − ln cosh h and v·p + w·q = 2m·(h·tanh h − ln cosh h), because
    p, q = m·(1 ± tanh h).
    """
    square = u * u * (1 / 4)
    log_cosh = square * (1 / 2 - square * (1 / 12 - square * (1 / 45 - square * (17 / 2520))))
    larger = -LN_2 * tl.log2(tl.exp2(-tl.abs(u) * LOG2_E) * (1 / 2) + 1 / 2)
    # The series is used up to here, because a logarithm near 1 errs by a rounding of 1, which is large beside |u| / 2.
    larger = tl.where(tl.abs(u) < 1 / 2, tl.abs(u) * (1 / 2) - log_cosh, larger)
    series = square * (1 - square * (1 / 2 - square * (2 / 9 - square * (17 / 180))))
    return larger + tl.minimum(u, 0.0), larger - tl.maximum(u, 0.0), series


@triton.jit
def _add_losses(losses, means, tiles, p, top, logs, temperature, DIVERGENCE, SWEEP, SWEEPS):
    """Adds a tile to the divergences' sums per lane. For "jsd", losses[i, j > i] is 2·kl, and `means` is Σ p·v."""
    R: tl.constexpr = len(tiles)
    S: tl.constexpr = len(losses) // R
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
                    i_term, j_term = _kl_both_ways(u, p[i], p[j])
                    if DIVERGENCE == "forward":
                        i_term, j_term = j_term, i_term
                    losses = _put(losses, i * R + j, losses[i * R + j] + tl.sum(i_term, axis=1))
                    if j < S:
                        losses = _put(losses, j * R + i, losses[j * R + i] + tl.sum(j_term, axis=1))
    return losses, means


@triton.jit
def _coefficients(weights, scale, means, row, ce_on, kl_on, S, R, CE, KL):
    """Returns a: S numbers, d/d ce; c: S × R numbers, d/d kl times `scale`, the common factor of all gradients; and S
    sums Σ_j c_ij·E_i[v_ij], which are +inf where a logit was −inf, because there the gradient does not exist."""
    ce_weight, ce_strides, kl_weight, kl_strides = weights
    a, c, sums = (0.0,) * S, (0.0,) * (S * R), (0.0,) * S
    for i in tl.static_range(S):
        if CE and ce_weight is not None:
            place = ce_weight + i * ce_strides[0] + row.to(tl.int64) * ce_strides[1]
            a = _put(a, i, tl.where(ce_on, tl.load(place).to(tl.float32), 0.0))
        for j in tl.static_range(R):
            if KL and j != i:
                place = kl_weight + i * kl_strides[0] + j * kl_strides[1] + row.to(tl.int64) * kl_strides[2]
                weight = tl.where(kl_on, tl.load(place).to(tl.float32) * scale, 0.0)
                c = _put(c, i * R + j, weight)
                mean = tl.where(means[i * R + j] > INFINITE, float("inf"), means[i * R + j])
                # This is a fused multiply-add, as in `_gradients`: else the two would not cancel where p is almost 1.
                sums = _put(sums, i, sums[i] + weight * tl.where(weight == 0, 0.0, mean))
    return a, c, sums


@triton.jit
def _gradients(tiles, p, top, logs, plain, means, a, c, temperature, DIVERGENCE, KL):
    """Returns S tiles, without the −a at the label. `means` are the sums of `_coefficients`."""
    S: tl.constexpr = len(a)
    R: tl.constexpr = len(tiles)
    tilts = (tl.zeros_like(tiles[0]),) * S  # Σ_j c_ij·p_i·v_ij
    if KL and DIVERGENCE != "forward":
        for i in tl.static_range(S):
            for j in tl.static_range(i + 1, R):
                if DIVERGENCE == "jsd":
                    u = _log_ratio(tiles[i], tiles[j], top[i], top[j], logs[i], logs[j], temperature)
                    v, w, _ = _to_mean(u)
                else:
                    v = tiles[i] - tiles[j]
                    w = -v
                # p is multiplied first: where a logit of −inf makes v huge, p is 0 or the gradient does not exist.
                tilts = _put(tilts, i, tilts[i] + (c[i * R + j] * p[i]) * v)
                if j < S:
                    tilts = _put(tilts, j, tilts[j] + (c[j * R + i] * p[j]) * w)
    gradients = ()
    for i in tl.static_range(S):
        if len(plain) > 0:
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
def _store(gradients, places, strides, row, column, width, label, a, UNIT):
    for i in tl.static_range(len(a)):
        if places[i] is not None:
            gradient = tl.where(column == label, gradients[i] - a[i], gradients[i])
            address = _address(places[i], row, column, strides, i, UNIT)
            tl.store(address, gradient.to(places[i].dtype.element_ty), mask=column < width)


@triton.jit
def _store_loss(place, value):
    """Stores +inf for a value that a logit of −inf has values huge."""
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
    DIVERGENCE: tl.constexpr,
    TEMPERED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    SWEEPS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Computes the losses of one row, or their gradients, or both.

    Args:
        logits: R pointers. strides: R × (row, column).
        gradients: S pointers, None where unwanted. They may be the logits themselves. None: only losses are computed.
        gradient_strides: S × (row, column).
        targets: [N]. None: no CE. ce_rows, kl_rows: [N] bool, the rows in which CE and KL count. None: every row.
        ce [S, N], kl [S, R, N]: The losses, contiguous. ce is None: only gradients. kl is None: no divergence.
        statistics [2R + S, N]: m, Σ at T, Σ at 1. mean_ratios [S, R, N]: E_i[x_i − x_j] for "reverse", E_i[v_ij] for
            "jsd". They are written (if not None) with losses, and read without.
        ce_weight, kl_weight: d/d ce and d/d kl, the latter to be multiplied by kl_scale. Any strides. None: zeros.
        width: The number of columns that may be read and written. vocabulary: V if it is less, else None. The columns
            in between may hold anything, and their gradient is 0.
        UNIT: Every column stride is 1. BLOCKS: The number of blocks of LANES·VEC in a row that stays on chip, where
            each logit is read once. 0: the row does not stay on chip.
    """
    row = tl.program_id(0)
    R: tl.constexpr = len(logits)
    LOSSES: tl.constexpr = ce is not None
    GRADIENTS: tl.constexpr = gradients is not None
    CE: tl.constexpr = targets is not None
    KL: tl.constexpr = R > 1 and (kl is not None or kl_weight is not None)
    MOMENTS: tl.constexpr = KL and DIVERGENCE == "reverse"
    MEANS: tl.constexpr = KL and DIVERGENCE == "jsd"
    SPLIT: tl.constexpr = MEANS and LOSSES and GRADIENTS
    PARTS_OF_UPDATE: tl.constexpr = PARTS if MOMENTS and S > 4 else 1  # Each part rescales all sums so far.
    BLOCK: tl.constexpr = LANES * VEC
    blocks = tl.cdiv(width, BLOCK)

    ce_on = tl.load(ce_rows + row) != 0 if CE else False
    kl_on = tl.load(kl_rows + row) != 0 if KL and kl_rows is not None else KL

    if ce_on or kl_on:
        floor = FLOOR * tl.minimum(temperature, 1.0)
        label = -1
        label_logits = ()
        if CE:
            label = tl.load(targets + row, mask=ce_on, other=-1).to(tl.int32)
            for i in tl.static_range(S if LOSSES else 0):  # It is read before a gradient overwrites it.
                address = _address(logits[i], row, label, strides, i, UNIT)
                label_logits = label_logits + (tl.load(address, mask=ce_on, other=0.0).to(tl.float32),)
        nothing = tl.zeros((LANES,), tl.float32)

        row_tiles = ()
        for k in tl.static_range(BLOCKS):
            row_tiles = row_tiles + _load(logits, strides, row, k, width, UNIT, LANES, VEC, "evict_first")
        top, total, plain, means = (), (), (), (0.0,) * (S * R)
        if LOSSES:
            tops, totals = (nothing + floor / 2,) * R, (nothing,) * R
            plains, moments = (nothing,) * (S if TEMPERED else 0), (nothing,) * (S * R if MOMENTS else 0)
            for block in range(blocks):
                raw = _read(row_tiles, logits, strides, row, block, width, UNIT, LANES, VEC, "evict_last")
                for part in range(PARTS_OF_UPDATE):
                    _, tiles = _part(raw, logits, block, part, vocabulary, floor, LANES, VEC, PARTS_OF_UPDATE)
                    tops, totals, plains, moments = _update(tiles, tops, totals, plains, moments, temperature)
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
                                # One refinement restores what the sums over lanes have rounded off.
                                rest = (moments[r * R + j] - mean * totals[r]) * share
                                means = _put(means, r * R + j, mean + tl.sum(rest, axis=0) / total[r])
            if statistics is not None:
                for r in tl.static_range(R):
                    tl.store(statistics + r * tokens + row, top[r])
                    tl.store(statistics + (R + r) * tokens + row, total[r])
                for i in tl.static_range(len(plain)):
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
        logs = [LN_2 * tl.log2(x) for x in total]

        scale = kl_scale / temperature * (0.5 if DIVERGENCE == "jsd" else 1.0)
        if DIVERGENCE == "reverse":
            scale = scale / temperature
        weights = (ce_weight, ce_weight_strides, kl_weight, kl_weight_strides)
        if GRADIENTS and not SPLIT:
            a, c, weighted = _coefficients(weights, scale, means, row, ce_on, kl_on, S, R, CE, KL)

        if KL or GRADIENTS:
            for sweep in tl.static_range(SWEEPS if LOSSES else 1):
                losses = (nothing,) * (S * R if LOSSES and KL else 0)
                sums = (nothing,) * (S * R if LOSSES and MEANS else 0)
                for step in range(blocks):
                    block = blocks - 1 - step
                    raw = _read(row_tiles, logits, strides, row, block, width, UNIT, LANES, VEC, "evict_first")
                    for part in range(PARTS):
                        column, tiles = _part(raw, logits, block, part, vocabulary, floor, LANES, VEC, PARTS)
                        p = _softmax(tiles, top, total, temperature)
                        if LOSSES and KL:
                            losses, sums = _add_losses(
                                losses, sums, tiles, p, top, logs, temperature, DIVERGENCE, sweep, SWEEPS
                            )
                        if GRADIENTS and not SPLIT:
                            values = _gradients(tiles, p, top, logs, plain, weighted, a, c, temperature, DIVERGENCE, KL)
                            _store(values, gradients, gradient_strides, row, column, width, label, a, UNIT)
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
            a, c, weighted = _coefficients(weights, scale, means, row, ce_on, kl_on, S, R, CE, KL)
            for block in range(blocks):
                raw = _read(row_tiles, logits, strides, row, block, width, UNIT, LANES, VEC, "evict_first")
                for part in range(PARTS):
                    column, tiles = _part(raw, logits, block, part, vocabulary, floor, LANES, VEC, PARTS)
                    p = _softmax(tiles, top, total, temperature)
                    values = _gradients(tiles, p, top, logs, plain, weighted, a, c, temperature, DIVERGENCE, KL)
                    _store(values, gradients, gradient_strides, row, column, width, label, a, UNIT)
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
