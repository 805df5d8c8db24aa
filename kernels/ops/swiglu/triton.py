"""The gated activation in Triton. The backward pass recomputes silu(gate), so that only the inputs are saved.

Shapes: N rows (tokens), D hidden. Contiguous tensors are taken as one row of N·D.

The gradients, with s = sigmoid(gate), are  dup = dy · gate · s  and  dgate = dy · up · s · (1 + gate · (1 − s)).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.registration import op

_CONSTANTS: dict[str, Any] = {"BLOCK": launch.SWIGLU.block, "num_warps": launch.SWIGLU.warps}


@op("swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `kernels.swiglu`. It is differentiable once."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        gate_ND, up_ND = _rows(gate, up)
        N, D = gate_ND.shape
        with torch.cuda.device_of(gate):
            _forward_kernel[(N * launch.blocks(D, launch.SWIGLU.block),)](
                gate_ND, up_ND, out, D, gate_ND.stride(0), up_ND.stride(0), **_CONSTANTS
            )
    return out


@op("swiglu_backward")
def run_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and up."""
    gate_grad, up_grad = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if grad.numel():
        grad_ND, gate_ND, up_ND = _rows(grad, gate, up)
        N, D = gate_ND.shape
        with torch.cuda.device_of(gate):
            _backward_kernel[(N * launch.blocks(D, launch.SWIGLU.block),)](
                grad_ND,
                gate_ND,
                up_ND,
                gate_grad,
                up_grad,
                D,
                grad_ND.stride(0),
                gate_ND.stride(0),
                up_ND.stride(0),
                **_CONSTANTS,
            )
    return gate_grad, up_grad


swiglu.register_fake(lambda gate, up: gate.new_empty(gate.shape))
run_backward.register_fake(lambda grad, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)))


swiglu.register_autograd(
    lambda ctx, grad: run_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Returns each as [1, N·D] if all are contiguous, else as [N, D] with adjacent columns, copied only if necessary."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
    return [x if x.stride(1) == 1 else x.contiguous() for x in rows]


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, D, gate_stride, up_stride, BLOCK: tl.constexpr):
    blocks, column = tl.cdiv(D, BLOCK), tl.arange(0, BLOCK)
    row, start = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    inside = column < D - start
    gate = tl.load(gate_ptr + row * gate_stride + start + column, mask=inside, other=0)
    up = tl.load(up_ptr + row * up_stride + start + column, mask=inside, other=0)
    wide = tl.float64 if gate.dtype == tl.float64 else tl.float32
    product = gate.to(wide) * tl.sigmoid(gate.to(wide)) * up.to(wide)
    tl.store(out_ptr + row * D + start + column, product.to(gate.dtype), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, gate_grad_ptr, up_grad_ptr, D, grad_stride, gate_stride, up_stride, BLOCK: tl.constexpr
):
    blocks, column = tl.cdiv(D, BLOCK), tl.arange(0, BLOCK)
    row, start = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    inside = column < D - start
    grad = tl.load(grad_ptr + row * grad_stride + start + column, mask=inside, other=0)
    gate = tl.load(gate_ptr + row * gate_stride + start + column, mask=inside, other=0)
    up = tl.load(up_ptr + row * up_stride + start + column, mask=inside, other=0)
    dtype = gate.dtype
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    grad, gate, up = grad.to(wide), gate.to(wide), up.to(wide)
    sigmoid = tl.sigmoid(gate)
    up_grad = grad * gate * sigmoid
    gate_grad = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(up_grad_ptr + row * D + start + column, up_grad.to(dtype), mask=inside)
    tl.store(gate_grad_ptr + row * D + start + column, gate_grad.to(dtype), mask=inside)
