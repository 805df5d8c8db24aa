"""`linear_ensemble_kl` on a GPU. cuBLAS does the matrix products. Between them, one launch runs over a chunk's logits.

Shapes: N tokens, D hidden, V vocabulary, W = V rounded up to a multiple of 64, S students, K teachers, R = S + K
streams; n tokens of a chunk.

Logits are fp32 whatever the storage. Their gradients have the storage's dtype, as the next products' operands must.
Gradients in fp32 replace the logits. They are not divided by the normalizer, which would take them below fp16's range.
The products' alpha does that, in fp32. Sums over chunks are fp32.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.triton import loss_and_grad
from kernels.ops.linear_ensemble_kl import Projected
from kernels.ops.linear_ensemble_kl.reference import even_chunk
from kernels.registration import op

CHUNK_BYTES = 2**30  # The size of a chunk's logits and gradients.
MIN_CHUNK_ROWS = 1024  # Fewer rows leave the products' last tiles idle (pytorch issue 124480).
ALIGNMENT = 64  # Columns. Rows begin on 128 bytes, so every load of 16 bytes is aligned and whole.


def losses_and_gradients(
    students: Sequence[Projected],
    teachers: Sequence[Projected],
    spec: LossSpec,
    normalizer: int | Tensor,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor, Tensor, Tensor | None, list[list[Tensor | None]]]:
    """See `losses_and_gradients` in `reference.py`.

    Raises:
        ValueError: A tensor is float64.
    """
    streams = [*students, *teachers]
    for r, stream in enumerate(streams):
        if any(x is not None and x.dtype == torch.float64 for x in stream):
            raise ValueError(
                f"stream {r} holds torch.float64: the Triton kernel computes in fp32; convert it, or choose"
                " kernels.backend('reference')"
            )
    ce, kl, *flat_gradients = _sweep(
        [x for stream in streams for x in stream],
        spec.targets,
        spec.ce_weight.float(),
        None if spec.kl_weight is None else spec.kl_weight.float(),
        spec.ce_rows,
        spec.kl_rows,
        float(spec.temperature),
        spec.divergence,
        normalizer if isinstance(normalizer, Tensor) else None,
        1.0 if isinstance(normalizer, Tensor) else 1 / normalizer,
        [need for flags in needs for need in flags],
    )
    remaining = iter(flat_gradients)
    gradients = [
        [next(remaining) if x is not None and need else None for x, need in zip(student, flags, strict=True)]
        for student, flags in zip(students, needs, strict=True)
    ]
    kl = None if spec.kl_weight is None else kl
    return spec.normalized(normalizer, torch.float32).total_losses(ce, kl), ce, kl, gradients


@op("linear_ensemble_kl")
def _sweep(
    streams: Sequence[Tensor | None],
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
    """Returns [ce, kl, *gradients]. The gradients are multiplied by alpha / divisor. Those not needed are left out.

    Args:
        streams: hidden, weight and bias of each stream. needs: The flags of each student's.
    """
    hidden, weight, bias = (cast(Sequence[Any], streams[k::3]) for k in range(3))
    S, N, V = len(ce_weight), len(targets), len(weight[0])
    ce, kl, *gradients = outputs = _allocate(streams, targets, ce_weight, needs)
    if kl_weight is None:
        kl.zero_()
    targets, ce_rows, kl_rows = targets.contiguous(), ce_rows.contiguous(), kl_rows.contiguous()
    spec = LossSpec(targets, ce_weight, kl_weight, ce_rows, kl_rows, temperature, divergence)
    active = spec.active_rows
    # Products take the dtype of hidden states and head if they agree, else fp32.
    heads = [w if h.dtype == w.dtype else w.float() for h, w in zip(hidden, weight, strict=True)]
    wanted = [any(needs[3 * i : 3 * i + 3]) for i in range(S)]
    gradient_bytes = sum(
        w.element_size() for w, want in zip(heads, wanted, strict=False) if want and w.dtype != torch.float32
    )
    chunk = even_chunk(N, max(MIN_CHUNK_ROWS, CHUNK_BYTES // (V * (4 * len(heads) + gradient_bytes))))
    width = math.ceil(V / ALIGNMENT) * ALIGNMENT
    logits_RnW = [ce.new_empty(chunk, width) for _ in heads]
    d_SnW = [
        None if not want else logits if w.dtype == torch.float32 else torch.empty_like(logits, dtype=w.dtype)
        for logits, w, want in zip(logits_RnW, heads, wanted, strict=False)
    ]
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        n = rows.stop - start
        # Inactive rows may hold anything. As zeros they cannot spread a NaN through the products.
        inactive = ~active[rows, None]
        inputs = [h[rows].masked_fill(inactive, 0).to(w.dtype) for h, w in zip(hidden, heads, strict=True)]
        for x, w, b, logits in zip(inputs, heads, bias, logits_RnW, strict=True):
            out = logits[:n, :V]
            if b is not None:
                out.copy_(b.expand(n, V))
            _add_product(out, x, w.T, beta=0 if b is None else 1)
        d = [None if d_nW is None else d_nW[:n] for d_nW in d_SnW]
        ce[:, rows], kl_SRn = loss_and_grad([logits[:n] for logits in logits_RnW], d, spec.for_rows(rows), V)
        if kl_SRn is not None:
            kl[:, :, rows] = kl_SRn
        remaining = iter(gradients)
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
                d_bias, chunk_sum = next(remaining), d_nV.sum(0, dtype=torch.float32)
                torch.mul(chunk_sum, alpha, out=d_bias) if start == 0 else d_bias.add_(chunk_sum, alpha=alpha)
    if N == 0:
        return [x.zero_() for x in outputs]
    return outputs if divisor is None else [ce, kl, *(gradient.div_(divisor) for gradient in gradients)]


_sweep.register_fake(lambda streams, targets, ce_weight, *rest: _allocate(streams, targets, ce_weight, needs=rest[-1]))


def _allocate(
    streams: Sequence[Tensor | None], targets: Tensor, ce_weight: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    S, R, N = len(ce_weight), len(streams) // 3, len(targets)
    ce = ce_weight.new_empty(S, N)
    gradients = [ce.new_empty(x.shape) for x, need in zip(streams, needs, strict=False) if x is not None and need]
    return [ce, ce.new_empty(S, R, N), *gradients]


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: int) -> None:
    """Computes total = beta·total + alpha·a·b in fp32, whatever a's and b's dtype. If beta is 0, total may hold NaN."""
    if a.dtype != torch.float32 and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, alpha=alpha, beta=beta, out=total)
    else:  # A CPU has no such product.
        torch.addmm(total, a.float(), b.float(), alpha=alpha, beta=beta, out=total)
