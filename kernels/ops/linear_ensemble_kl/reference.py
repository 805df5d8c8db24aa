"""`linear_ensemble_kl` in plain torch, a chunk of tokens at a time.

Shapes: N tokens, D hidden, V vocabulary, S students, K teachers, R = S + K streams; n tokens of a chunk.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.reference import loss_and_grad, widest_dtype
from kernels.ops.linear_ensemble_kl import Projected

# The bytes of a chunk's [n, V] tensors. On a CPU small chunks stay in cache. A GPU needs at least 1,000 rows.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}
TEMPORARIES = 13  # [n, V] tensors alive at the peak of `loss_and_grad`, beside logits and gradients (measured).


def even_chunk(tokens: int, most: int) -> int:
    """Returns how many tokens a chunk takes, such that chunks have almost the same size and at most `most` tokens."""
    chunks = max(1, math.ceil(tokens / most))
    return max(1, math.ceil(tokens / chunks))


def losses_and_gradients(
    students: Sequence[Projected],
    teachers: Sequence[Projected],
    spec: LossSpec,
    normalizer: int | Tensor,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor, Tensor, Tensor | None, list[list[Tensor | None]]]:
    """Computes the losses of `kernels.linear_ensemble_kl` and their gradients. Call it under no_grad.

    Args:
        students, teachers, normalizer: As in `kernels.linear_ensemble_kl`, without teachers if there is no `kl_weight`.
        needs: For each student, whether the gradients of (hidden, weight, bias) are wanted.

    Returns:
        losses [S]; ce [S, N]; kl [S, R, N], or None without `kl_weight`; for each student the gradients of (hidden,
        weight, bias), None where unwanted. All are fp32, or float64 if a stream is.
    """
    streams = [*students, *teachers]
    dtype = widest_dtype(x for stream in streams for x in stream)
    heads = [(weight.to(dtype), None if bias is None else bias.to(dtype)) for _, weight, bias in streams]
    spec = spec.normalized(normalizer, dtype)
    gradients = [
        [
            torch.zeros_like(x, dtype=dtype) if x is not None and need else None
            for x, need in zip(student, flags, strict=True)
        ]
        for student, flags in zip(students, needs, strict=True)
    ]

    active, wanted = spec.active_rows, [any(flags) for flags in needs]
    device, tokens, vocab_size = active.device, len(active), len(heads[0][0])
    ce_SN = torch.zeros(len(students), tokens, dtype=dtype, device=device)
    kl_SRN = None if spec.kl_weight is None else ce_SN.new_zeros(*spec.kl_weight.shape, tokens)
    row_bytes = (len(streams) + len(students) + TEMPORARIES) * vocab_size * dtype.itemsize
    chunk = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // row_bytes)
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        # Inactive rows may hold anything. As zeros they cannot spread a NaN through the matrix products.
        hidden = [stream.hidden[rows].to(dtype).masked_fill(~active[rows, None], 0) for stream in streams]
        logits = [torch.nn.functional.linear(h, *head) for h, head in zip(hidden, heads, strict=True)]
        ce_SN[:, rows], kl_SRn, d_logits = loss_and_grad(logits, spec.for_rows(rows), wanted)
        if kl_SRN is not None and kl_SRn is not None:
            kl_SRN[:, :, rows] = kl_SRn
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
