"""The gated activation in Triton. The forward pass reads gate and up and writes the product. The backward pass reads
both and the incoming gradient and recomputes silu(gate), so that only the inputs are saved.

Shapes: N rows (tokens), D hidden. Contiguous tensors are taken as one row of N·D.

The gradients, with s = sigmoid(gate), are  dup = dy · gate · s  and  dgate = dy · up · s · (1 + gate · (1 − s)).
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.registration import op


@op("swiglu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `kernels.swiglu`. It is differentiable once."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        gate_ND, up_ND = _rows(gate, up)
        N, D = gate_ND.shape
        constants = _constants()
        with torch.cuda.device_of(gate):
            _forward_kernel[(N * launch.blocks(D, constants["BLOCK"]),)](
                gate_ND, up_ND, out, D, gate_ND.stride(0), up_ND.stride(0), **constants
            )
    return out


@op("swiglu_backward")
def run_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and up."""
    gate_grad, up_grad = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if grad.numel():
        grad_ND, gate_ND, up_ND = _rows(grad, gate, up)
        N, D = gate_ND.shape
        constants = _constants()
        with torch.cuda.device_of(gate):
            _backward_kernel[(N * launch.blocks(D, constants["BLOCK"]),)](
                grad_ND,
                gate_ND,
                up_ND,
                gate_grad,
                up_grad,
                D,
                grad_ND.stride(0),
                gate_ND.stride(0),
                up_ND.stride(0),
                **constants,
            )
    return gate_grad, up_grad


swiglu.register_fake(lambda gate, up: gate.new_empty(gate.shape))
run_backward.register_fake(lambda grad, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return run_backward(grad, *ctx.saved_tensors)


swiglu.register_autograd(_differentiate, setup_context=_save)


@functools.cache
def _constants() -> dict[str, Any]:
    chosen = launch.swiglu()
    return {"BLOCK": chosen.block, "num_warps": chosen.warps}


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
