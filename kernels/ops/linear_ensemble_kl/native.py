"""`linear_ensemble_kl` on a CPU: matrix products by torch's BLAS, and between them one pass over a chunk's logits,
which their gradients replace.

Shapes: N tokens, D hidden, V vocabulary, S students, K teachers, R = S + K streams; n tokens of a chunk.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.native import loss_and_grad_
from kernels.ops.linear_ensemble_kl import Projected, TopK, top_k
from kernels.ops.linear_ensemble_kl.reference import weighted_losses

BUDGET = 96 * 2**20  # bytes of logits at a time: below it the products lose more than the cache gains (LOG.md)


def losses_and_gradients(
    students: Sequence[Projected],
    teachers: Sequence[Projected | TopK],
    targets: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor | None,
    ce_rows: Tensor,
    kl_rows: Tensor,
    normalizer: int | Tensor,
    temperature: float,
    divergence: str,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor, Tensor, Tensor | None, list[list[Tensor | None]]]:
    """As `losses_and_gradients` in `reference.py`."""
    streams, dense, kept = top_k.split(students, teachers)
    dtype = torch.float32
    for x in (x for stream in streams for x in stream if x is not None):
        dtype = torch.promote_types(dtype, x.dtype)
    heads = [(weight.to(dtype), None if bias is None else bias.to(dtype)) for _, weight, bias in streams]
    counted = ce_rows if kl_weight is None else ce_rows | kl_rows
    ce_weight = ce_weight.to(dtype) / normalizer
    if kl_weight is not None:
        kl_weight = kl_weight.to(dtype) / normalizer
    wanted = [any(own) for own in needs]

    dense_weight = None if kl_weight is None or len(dense) == 1 else kl_weight[:, dense]
    tokens, vocabulary = len(targets), len(heads[0][0])
    chunk = _chunk(tokens, bytes_per_token=(len(streams) + len(students) * len(kept)) * vocabulary * dtype.itemsize)
    logits_RnV = [torch.empty(chunk, vocabulary, dtype=dtype) for _ in streams]
    gradients = [_empty_gradients(student, own, dtype) for student, own in zip(students, needs, strict=True)]
    ce_SN = torch.zeros(len(students), tokens, dtype=dtype)
    kl_SRN = None if kl_weight is None else ce_SN.new_zeros(*kl_weight.shape, tokens)
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        # Rows that do not count may hold anything: as zeros they cannot spread a NaN through the products.
        idle = ~counted[rows, None]
        hidden = [stream.hidden[rows].to(dtype) for stream in streams]
        if idle.any():
            hidden = [h.masked_fill(idle, 0) for h in hidden]
        logits = [buffer[: len(idle)] for buffer in logits_RnV]
        for h, (weight, bias), out in zip(hidden, heads, logits, strict=True):
            torch.mm(h, weight.T, out=out) if bias is None else torch.addmm(bias, h, weight.T, out=out)
        added: list[Tensor | None] = [None] * len(students)
        if kept and kl_SRN is not None:  # before gradients take the logits' place
            into = kl_SRN[:, :, rows]
            added = top_k.losses_and_gradients(
                logits[: len(students)], kept, rows, kl_weight, kl_rows, into, temperature, divergence, wanted
            )
        ce_SN[:, rows], kl_SRn = loss_and_grad_(
            logits,
            targets[rows],
            ce_weight,
            dense_weight,
            ce_rows[rows],
            kl_rows[rows],
            temperature=temperature,
            divergence=divergence,
            wanted=wanted,
        )
        if kl_SRN is not None and kl_SRn is not None:
            kl_SRN[:, dense, rows] = kl_SRn
        for d, extra in zip(logits, added, strict=False):
            if extra is not None:
                d.add_(extra)
        for d, h, (weight, _), (d_hidden, d_weight, d_bias) in zip(logits, hidden, heads, gradients, strict=False):
            if d_hidden is not None:
                torch.mm(d, weight, out=d_hidden[rows])
            if d_weight is not None:
                torch.addmm(d_weight, d.T, h, beta=0 if start == 0 else 1, out=d_weight)
            if d_bias is not None:
                torch.add(d_bias, d.sum(0), alpha=1, out=d_bias) if start else torch.sum(d, 0, out=d_bias)

    return weighted_losses(ce_weight, ce_SN, kl_weight, kl_SRN, temperature), ce_SN, kl_SRN, gradients


def _chunk(tokens: int, bytes_per_token: int) -> int:
    """How many tokens to take at a time: within the budget, and in chunks as even as can be."""
    most = max(1, BUDGET // bytes_per_token)
    chunks = max(1, math.ceil(tokens / most))
    return max(1, math.ceil(tokens / chunks))


def _empty_gradients(student: Projected, needs: Sequence[bool], dtype: torch.dtype) -> list[Tensor | None]:
    make = torch.empty if len(student.hidden) else torch.zeros
    return [
        make(x.shape, dtype=dtype) if x is not None and need else None for x, need in zip(student, needs, strict=True)
    ]
