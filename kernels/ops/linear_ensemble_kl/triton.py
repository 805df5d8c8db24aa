"""`linear_ensemble_kl` on a GPU: matrix products by cuBLAS, and between them one launch over a chunk's logits, and one
more for each student and teacher of whom only the top k is known (`triton_top_k.py`).

Shapes: N tokens, D hidden, V vocabulary, W = V rounded up to a multiple of 64, S students, K teachers, R = S + K
streams; n tokens of a chunk.

Logits are fp32 whatever the storage. Their gradients have the storage's dtype, as the next products' operands must; in
fp32 they replace the logits, unless such launches follow. They are not divided by the normalizer, which would take them
below fp16's range: the products' alpha does that, in fp32. Sums over chunks are fp32.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.triton import loss_and_grad
from kernels.ops.linear_ensemble_kl import Projected, TopK, top_k
from kernels.ops.linear_ensemble_kl.triton_top_k import add_divergence
from kernels.registration import op

CHUNK_BYTES = 2**30  # of logits and their gradients at a time
CHUNK_ROWS = 1024  # at least: fewer leave the products' last tiles idle (pytorch issue 124480)
ALIGNMENT = 64  # columns: rows begin on 128 bytes, and every load of 16 bytes is aligned and whole


def losses_and_gradients(
    students: Sequence[Projected],
    teachers: Sequence[Projected | TopK],
    spec: LossSpec,
    normalizer: int | Tensor,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor, Tensor, Tensor | None, list[list[Tensor | None]]]:
    """As `losses_and_gradients` in `reference.py`.

    Raises:
        ValueError: a tensor of float64.
    """
    streams, dense, kept = top_k.split(students, teachers)
    for r, stream in zip(dense, streams, strict=True):
        if any(x is not None and x.dtype == torch.float64 for x in stream):
            raise ValueError(
                f"stream {r} holds torch.float64: the Triton kernel computes in fp32; convert it, or choose"
                " kernels.backend('reference')"
            )
    order, kl_weight = [*dense, *(r for r, _ in kept)], spec.kl_weight
    ce, kl, *made = _sweep(
        [x for stream in streams for x in stream],
        [x for _, top in kept for x in top],
        spec.targets,
        spec.ce_weight.float(),
        None if kl_weight is None else _in_order(kl_weight.float(), order),
        spec.ce_rows,
        spec.kl_rows,
        float(spec.temperature),
        spec.divergence,
        normalizer if isinstance(normalizer, Tensor) else None,
        1.0 if isinstance(normalizer, Tensor) else 1 / normalizer,
        [need for own in needs for need in own],
    )
    remaining = iter(made)
    gradients = [
        [next(remaining) if x is not None and need else None for x, need in zip(student, own, strict=True)]
        for student, own in zip(students, needs, strict=True)
    ]
    kl = None if kl_weight is None else _in_order(kl, [order.index(r) for r in range(len(order))])
    return spec.normalized(normalizer, torch.float32).total_losses(ce, kl), ce, kl, gradients


@op("linear_ensemble_kl")
def _sweep(
    streams: Sequence[Tensor | None],
    top_ks: Sequence[Tensor],
    targets: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor | None,
    ce_rows: Tensor,
    kl_rows: Tensor,
    temperature: float,
    divergence: str,
    divisor: Tensor | None,
    alpha: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """[ce, kl, *gradients]; the gradients are multiplied by alpha / divisor. Those not needed are left out.

    streams: hidden, weight, bias of each; needs: the same of each student.
    top_ks: log_prob, index, tail of the teachers known by them; theirs are the last columns of kl_weight and kl.
    """
    hidden, weight, bias = (cast(Sequence[Any], streams[k::3]) for k in range(3))
    S, N, V, dense = len(ce_weight), len(targets), len(weight[0]), len(hidden)
    ce, kl, *made = outputs = _allocate(streams, top_ks, targets, ce_weight, needs)
    if kl_weight is None:
        kl.zero_()
    else:
        kl_weight = kl_weight.contiguous()
    kept = [TopK(*(x.contiguous() for x in top_ks[k : k + 3])) for k in range(0, len(top_ks), 3)]
    targets, ce_rows, kl_rows = targets.contiguous(), ce_rows.contiguous(), kl_rows.contiguous()
    spec = LossSpec(targets, ce_weight, kl_weight, ce_rows, kl_rows, temperature, divergence)
    of_dense = spec if kl_weight is None else spec._replace(kl_weight=kl_weight[:, :dense])
    counted = spec.active_rows
    heads = [_head(h, w) for h, w in zip(hidden, weight, strict=True)]
    wanted = [any(needs[3 * i : 3 * i + 3]) for i in range(S)]
    apart = [bool(kept) or w.dtype != torch.float32 for w in heads]  # whether gradients do not take the logits' place
    chunk = _chunk_rows(N, V, heads, [a and b for a, b in zip(wanted, apart, strict=False)])
    width = math.ceil(V / ALIGNMENT) * ALIGNMENT
    logits_RnW = [ce.new_empty(chunk, width) for _ in heads]
    d_SnW = [
        None if not want else torch.empty_like(logits, dtype=w.dtype) if aside else logits
        for logits, w, want, aside in zip(logits_RnW, heads, wanted, apart, strict=False)
    ]
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        n = rows.stop - start
        # Rows that do not count may hold anything: as zeros they cannot spread a NaN through the products.
        idle = ~counted[rows, None]
        inputs = [h[rows].masked_fill(idle, 0).to(w.dtype) for h, w in zip(hidden, heads, strict=True)]
        for x, w, b, logits in zip(inputs, heads, bias, logits_RnW, strict=True):
            out = logits[:n, :V]
            if b is not None:
                out.copy_(b.expand(n, V))
            _add_product(out, x, w.T, beta=0 if b is None else 1)
        d = [None if d_nW is None else d_nW[:n] for d_nW in d_SnW]
        ce[:, rows], kl_SRn = loss_and_grad([logits[:n] for logits in logits_RnW], d, of_dense.for_rows(rows), V)
        if kl_SRn is not None:
            kl[:, :dense, rows] = kl_SRn
        for r, teacher in enumerate(kept if kl_weight is not None else (), start=dense):
            for i in range(S):
                logits = logits_RnW[i][:n]
                add_divergence(logits, d[i], teacher, spec, kl, first=start, pair=(i, r), vocabulary=V)
        remaining = iter(made)
        for i, d_nW in enumerate(d):
            if d_nW is None:
                continue
            d_nV = d_nW[:, :V]
            beta = 0 if start == 0 else 1
            if needs[3 * i]:
                _add_product(next(remaining)[rows], d_nV, heads[i], alpha=alpha, beta=0)
            if needs[3 * i + 1]:
                _add_product(next(remaining), d_nV.T, inputs[i], alpha=alpha, beta=beta)
            if needs[3 * i + 2]:
                total, summand = next(remaining), d_nV.sum(0, dtype=torch.float32)
                torch.mul(summand, alpha, out=total) if start == 0 else total.add_(summand, alpha=alpha)
    if N == 0:
        return [x.zero_() for x in outputs]
    return outputs if divisor is None else [ce, kl, *(gradient.div_(divisor) for gradient in made)]


@_sweep.register_fake
def _(
    streams: Sequence[Tensor | None], top_ks: Sequence[Tensor], targets: Tensor, ce_weight: Tensor, *rest: Any
) -> list[Tensor]:
    return _allocate(streams, top_ks, targets, ce_weight, needs=rest[-1])


def _allocate(
    streams: Sequence[Tensor | None],
    top_ks: Sequence[Tensor],
    targets: Tensor,
    ce_weight: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    S, R, N = len(ce_weight), (len(streams) + len(top_ks)) // 3, len(targets)
    ce = ce_weight.new_empty(S, N)
    gradients = [ce.new_empty(x.shape) for x, need in zip(streams, needs, strict=False) if x is not None and need]
    return [ce, ce.new_empty(S, R, N), *gradients]


def _head(hidden: Tensor, weight: Tensor) -> Tensor:
    """The head in the dtype of the products: the storage's if there is one, else fp32."""
    return weight if hidden.dtype == weight.dtype else weight.float()


def _in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """x[:, order], without a copy of `order` to the device."""
    columns = x.unbind(1)
    return x if list(order) == sorted(order) else torch.stack([columns[r] for r in order], 1)


def _chunk_rows(tokens: int, width: int, heads: Sequence[Tensor], apart: Sequence[bool]) -> int:
    """Rows of a chunk: within the budget, but no fewer than the products need, and chunks as even as can be.

    apart: S flags: whose gradients are made, beside the logits.
    """
    of_gradients = sum(w.element_size() for w, aside in zip(heads, apart, strict=False) if aside)
    most = max(CHUNK_ROWS, CHUNK_BYTES // (width * (4 * len(heads) + of_gradients)))
    chunks = max(1, math.ceil(tokens / most))
    return max(1, math.ceil(tokens / chunks))


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: int) -> None:
    """total = beta·total + alpha·a·b, in fp32, whatever a and b are stored in; without beta, total may hold anything."""
    if a.dtype != torch.float32 and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, alpha=alpha, beta=beta, out=total)
    else:  # a CPU has no such product
        torch.addmm(total, a.float(), b.float(), alpha=alpha, beta=beta, out=total)
