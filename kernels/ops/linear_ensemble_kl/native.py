"""`linear_ensemble_kl` on a CPU. torch's BLAS does the matrix products. Between them, one pass over a chunk's logits
replaces them by their gradients.

If the processor has matrix tiles (AMX), a stream in bf16 is multiplied in bf16, into fp32 as always. The gradient of
its logits is then bf16 too, as on a GPU, and takes the first half of the row of logits that it replaces.

Shapes: N tokens, D hidden, V vocabulary, S students, K teachers, R = S + K streams; n tokens of a chunk.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.native import loss_and_grad_
from kernels.ops.ensemble_kl.reference import widest_dtype
from kernels.ops.linear_ensemble_kl import Projected
from kernels.ops.linear_ensemble_kl.reference import even_chunk

BUDGET = 96 * 2**20  # The bytes of a chunk's logits. With fewer, the products lose more than the cache gains (LOG.md).


def losses_and_gradients(
    students: Sequence[Projected],
    teachers: Sequence[Projected],
    spec: LossSpec,
    normalizer: int | Tensor,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor, Tensor, Tensor | None, list[list[Tensor | None]]]:
    """As `losses_and_gradients` in `reference.py`."""
    streams = [*students, *teachers]
    dtype = widest_dtype(x for stream in streams for x in stream)
    heads = [_TiledHead(x, dtype) if _uses_tiles(x, dtype) else _Head(x, dtype, dtype) for x in streams]
    spec = spec.normalized(normalizer, dtype)
    active = spec.active_rows
    tokens, vocab_size = len(active), len(streams[0].weight)
    chunk = even_chunk(tokens, max(1, BUDGET // (len(streams) * vocab_size * dtype.itemsize)))
    buffers_RnV = [torch.empty(chunk, vocab_size, dtype=dtype) for _ in streams]
    gradients = [
        _empty_gradients(student, flags, dtype, head)
        for student, flags, head in zip(students, needs, heads, strict=False)
    ]
    ce_SN = torch.zeros(len(students), tokens, dtype=dtype)
    kl_SRN = None if spec.kl_weight is None else ce_SN.new_zeros(*spec.kl_weight.shape, tokens)
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        # Inactive rows may hold anything. As zeros they cannot spread a NaN through the products.
        inactive = ~active[rows, None]
        hidden = [stream.hidden[rows].to(head.dtype) for stream, head in zip(streams, heads, strict=True)]
        if inactive.any():
            hidden = [h.masked_fill(inactive, 0) for h in hidden]
        logits = [buffer[: len(inactive)] for buffer in buffers_RnV]
        for h, head, out in zip(hidden, heads, logits, strict=True):
            head.project(h, out)
        d_logits = [x.view(head.dtype)[:, :vocab_size] for head, x in zip(heads, logits[: len(students)], strict=False)]
        wanted = [d if any(flags) else None for d, flags in zip(d_logits, needs, strict=True)]
        ce_SN[:, rows], kl_SRn = loss_and_grad_(logits, wanted, spec.for_rows(rows))
        if kl_SRN is not None and kl_SRn is not None:
            kl_SRN[:, :, rows] = kl_SRn
        for d, h, head, (d_hidden, d_weight, d_bias) in zip(d_logits, hidden, heads, gradients, strict=False):
            if d_hidden is not None:
                head.hidden_gradient(d, d_hidden[rows])
            if d_weight is not None:
                head.weight_gradient(d, h, d_weight, add=start > 0)
            if d_bias is not None:
                chunk_sum = torch.sum(d, 0, dtype=dtype)
                torch.add(d_bias, chunk_sum, out=d_bias) if start else d_bias.copy_(chunk_sum)

    return spec.total_losses(ce_SN, kl_SRN), ce_SN, kl_SRN, gradients


class _Head:
    """A stream's head, and its matrix products: the logits [n, V] and the gradients of hidden states and weight."""

    column_major = False  # Whether the weight's gradient is.

    def __init__(self, stream: Projected, dtype: torch.dtype, operand_dtype: torch.dtype) -> None:
        self.dtype = operand_dtype
        self._weight = stream.weight.to(operand_dtype)
        self._bias = None if stream.bias is None else stream.bias.to(dtype)

    def project(self, hidden_nD: Tensor, out_nV: Tensor) -> None:
        if self._bias is None:
            torch.mm(hidden_nD, self._weight.T, out=out_nV)
        else:
            torch.addmm(self._bias, hidden_nD, self._weight.T, out=out_nV)

    def hidden_gradient(self, d_nV: Tensor, out_nD: Tensor) -> None:
        torch.mm(d_nV, self._weight, out=out_nD)

    def weight_gradient(self, d_nV: Tensor, hidden_nD: Tensor, out_VD: Tensor, *, add: bool) -> None:
        torch.addmm(out_VD, d_nV.T, hidden_nD, beta=int(add), out=out_VD)


class _TiledHead(_Head):
    """A head whose products use matrix tiles."""

    column_major = True  # The product has D rows.

    def __init__(self, stream: Projected, dtype: torch.dtype) -> None:
        super().__init__(stream, dtype, torch.bfloat16)
        self._transposed_tiles = torch.ops.creche_native.tiled(self._weight.T)

    def project(self, hidden_nD: Tensor, out_nV: Tensor) -> None:
        if self._bias is not None:
            out_nV.copy_(self._bias.expand_as(out_nV))
        _mm_(hidden_nD, self._transposed_tiles, out_nV, add=self._bias is not None)

    def hidden_gradient(self, d_nV: Tensor, out_nD: Tensor) -> None:
        _mm_(d_nV, self._tiles, out_nD)

    def weight_gradient(self, d_nV: Tensor, hidden_nD: Tensor, out_VD: Tensor, *, add: bool) -> None:
        _mm_(hidden_nD.T, torch.ops.creche_native.tiled(d_nV), out_VD.T, add=add)

    @functools.cached_property
    def _tiles(self) -> Tensor:
        return torch.ops.creche_native.tiled(self._weight)


def _uses_tiles(stream: Projected, dtype: torch.dtype) -> bool:
    both_bf16 = stream.hidden.dtype == stream.weight.dtype == torch.bfloat16
    return both_bf16 and dtype == torch.float32 and torch.ops.creche_native.has_tiles()


def _mm_(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Computes out = left·right, or out += left·right. `right` is tiled, and has a row of zeros if its rows are odd."""
    left = torch.nn.functional.pad(left, (0, left.shape[1] % 2))
    torch.ops.creche_native.mm_tiled_(left if left.stride(1) == 1 else left.contiguous(), right, out, add)


def _empty_gradients(student: Projected, needs: Sequence[bool], dtype: torch.dtype, head: _Head) -> list[Tensor | None]:
    make = torch.empty if len(student.hidden) else torch.zeros

    def like(x: Tensor) -> Tensor:
        transposed = head.column_major and x is student.weight
        return make(x.T.shape, dtype=dtype).T if transposed else make(x.shape, dtype=dtype)

    return [None if x is None or not need else like(x) for x, need in zip(student, needs, strict=True)]
