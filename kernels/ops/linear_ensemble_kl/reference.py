"""`linear_ensemble_kl` in plain torch, a chunk of tokens at a time.

Shapes: N tokens, D hidden, V vocabulary, S students, K teachers, R = S + K streams; n tokens of a chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.reference import loss_and_grad, widest_dtype
from kernels.ops.linear_ensemble_kl import Projected, TopK, top_k

# What the [n, V] tensors of one chunk may take. On a CPU small chunks stay in cache; a GPU wants ≥ 1,000 rows.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}
TEMPORARIES = 13  # [n, V] tensors alive at the peak of `loss_and_grad`, beside logits and gradients (measured)


def losses_and_gradients(
    students: Sequence[Projected],
    teachers: Sequence[Projected | TopK],
    spec: LossSpec,
    normalizer: int | Tensor,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor, Tensor, Tensor | None, list[list[Tensor | None]]]:
    """The losses of `kernels.linear_ensemble_kl` and their gradients, without autograd (call it under no_grad).

    Args:
        teachers: none if the spec has no `kl_weight`.
        needs: per student, whether the gradients of (hidden, weight, bias) are wanted.
        Otherwise as `kernels.linear_ensemble_kl`.

    Returns:
        losses [S]; ce [S, N]; kl [S, R, N], or None without `kl_weight`; per student the gradients of (hidden, weight,
        bias), None where not wanted. All fp32, or float64 where a stream is.
    """
    streams, dense, kept = top_k.split(students, teachers)
    dtype = widest_dtype(x for stream in streams for x in stream)
    heads = [(weight.to(dtype), None if bias is None else bias.to(dtype)) for _, weight, bias in streams]
    spec = spec.normalized(normalizer, dtype)
    gradients = [
        [
            torch.zeros_like(x, dtype=dtype) if x is not None and need else None
            for x, need in zip(stream, own, strict=True)
        ]
        for stream, own in zip(students, needs, strict=True)
    ]

    counted, wanted, of_dense = spec.active_rows, [any(own) for own in needs], spec.for_streams(dense)
    device, tokens, vocabulary = counted.device, len(counted), len(heads[0][0])
    ce_SN = torch.zeros(len(students), tokens, dtype=dtype, device=device)
    kl_SRN = None if spec.kl_weight is None else ce_SN.new_zeros(*spec.kl_weight.shape, tokens)
    per_row = (len(streams) + (1 + bool(kept)) * len(students) + TEMPORARIES) * vocabulary * dtype.itemsize
    chunk = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // per_row)
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        # Rows that do not count may hold anything: as zeros they cannot spread a NaN through the GEMMs.
        hidden = [stream.hidden[rows].to(dtype).masked_fill(~counted[rows, None], 0) for stream in streams]
        logits = [torch.nn.functional.linear(h, *head) for h, head in zip(hidden, heads, strict=True)]
        added = top_k.losses_and_gradients(logits[: len(students)], kept, spec, rows, kl_SRN, wanted)
        ce_SN[:, rows], kl, d_logits = loss_and_grad(logits, of_dense.for_rows(rows), wanted)
        if kl_SRN is not None and kl is not None:
            kl_SRN[:, dense, rows] = kl
        d_logits = [
            d if d is None or extra is None else d.add_(extra) for d, extra in zip(d_logits, added, strict=True)
        ]
        for d, h, (weight, _), (d_hidden, d_weight, d_bias) in zip(d_logits, hidden, heads, gradients, strict=False):
            if d is None:
                continue
            if d_hidden is not None:
                torch.mm(d, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight.addmm_(d.T, h)
            if d_bias is not None:
                d_bias.add_(d.sum(0))

    return spec.total_losses(ce_SN, kl_SRN), ce_SN, kl_SRN, gradients
