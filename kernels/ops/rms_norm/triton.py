"""Root-mean-square normalisation in Triton. Both passes read each input once and write each output once.

Shapes: N rows (tokens), D hidden.

Forward, a program takes a tile of whole rows. With a residual it first rounds and stores the sum, so that it normalises
exactly what the next layer will read.

Backward, with x̂ = x · rsqrt(mean x² + eps) and g = dy · weight (roundings pass the gradient on):

    dx = rsqrt(mean x² + eps) · (g − x̂ · mean(g · x̂))      dweight = Σ_n dy · round(x̂)

The root mean square is recomputed from the row, which is on chip anyway, so that only x is saved. A fixed number of
programs each sum `dweight` into an fp32 row of their own, and these rows are added in a fixed order. There are no
atomics, so the result has the same bits each time.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.registration import op

MAX_COLUMNS = 16384  # No launch configuration keeps longer rows in registers.


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """See `kernels.rms_norm`. It is differentiable once.

    Raises:
        ValueError: D is above 16384.
    """
    if len(weight) > MAX_COLUMNS:
        raise ValueError(f"x has {len(weight)} columns: expected at most {MAX_COLUMNS}; choose backend 'reference'")
    normed, total = run_forward(x, weight, eps, residual)
    return normed if residual is None else (normed, total)


def _allocate(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    normed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return normed, x.new_empty(0 if residual is None else x.shape)


@op("rms_norm")
def run_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the normed input, and x + residual (empty without a residual)."""
    normed, total = _allocate(x, weight, eps, residual)
    if x.numel():
        x_ND, residual_ND = _rows(x), None if residual is None else _rows(residual)
        N, D = x_ND.shape
        constants = _constants(D, eps)
        with torch.cuda.device_of(x):
            _forward_kernel[(launch.blocks(N, constants["BLOCK_N"]),)](
                x_ND,
                residual_ND,
                weight.contiguous(),
                normed,
                None if residual is None else total,
                N,
                x_ND.stride(0),
                0 if residual_ND is None else residual_ND.stride(0),
                **constants,
            )
    return normed, total


@op("rms_norm_backward")
def run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, total_grad: Tensor | None, weight_wanted: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the weight (empty if unwanted). With a residual, x is the sum."""
    x_grad = x.new_empty(x.shape)
    if not x.numel():
        return x_grad, weight.new_zeros(weight.shape if weight_wanted else 0)
    grad_ND, x_ND, total_grad_ND = _rows(grad), _rows(x), None if total_grad is None else _rows(total_grad)
    N, D = x_ND.shape
    constants = _constants(D, eps)
    programs = min(launch.blocks(N, constants["BLOCK_N"]), launch.RMS_NORM_PARTIALS)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    partial_PD = x.new_empty(programs, D, dtype=wide) if weight_wanted else None
    with torch.cuda.device_of(x):
        _backward_kernel[(programs,)](
            grad_ND,
            x_ND,
            weight.contiguous(),
            total_grad_ND,
            x_grad,
            partial_PD,
            N,
            grad_ND.stride(0),
            x_ND.stride(0),
            0 if total_grad_ND is None else total_grad_ND.stride(0),
            **constants,
        )
    return x_grad, weight.new_empty(0) if partial_PD is None else partial_PD.sum(0).to(weight.dtype)


run_forward.register_fake(_allocate)
run_backward.register_fake(
    lambda grad, x, weight, eps, total_grad, weight_wanted: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape if weight_wanted else 0),
    )
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps, residual = inputs
    ctx.is_sum = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.is_sum else x, weight)


def _differentiate(ctx: Any, grad: Tensor | None, total_grad: Tensor | None) -> tuple:
    if grad is None:  # Nothing uses the normed output.
        return total_grad, None, None, total_grad
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    x_grad, weight_grad = run_backward(grad, x, weight, ctx.eps, total_grad if ctx.is_sum else None, wanted)
    return x_grad, weight_grad if wanted else None, None, x_grad if ctx.is_sum else None


run_forward.register_autograd(_differentiate, setup_context=_save)


@functools.cache
def _constants(D: int, eps: float) -> dict[str, Any]:
    columns = launch.power_of_2(D)
    chosen = launch.rows(columns)
    return {"D": D, "eps": eps, "BLOCK_N": chosen.block // columns, "BLOCK_D": columns, "num_warps": chosen.warps}


def _rows(x: Tensor) -> Tensor:
    """Returns x as [N, D] with adjacent columns, without a copy if the strides allow it."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,  # None: there is no residual, and no total is written.
    weight_ptr,
    normed_ptr,
    total_ptr,
    N,
    x_stride,
    residual_stride,
    D: tl.constexpr,
    eps: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (column < D)[None, :]
    place = row[:, None] * D + column[None, :]

    weight = tl.load(weight_ptr + column, mask=column < D, other=0)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0)
    x = x.to(tl.float64 if dtype == tl.float64 else tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0)
        total = (x + residual.to(x.dtype)).to(dtype)
        tl.store(total_ptr + place, total, mask=inside)
        x = total.to(x.dtype)
    x_hat = (x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]).to(dtype)
    wide = tl.float64 if weight.dtype == tl.float64 else x.dtype
    normed = x_hat.to(wide) * weight.to(wide)[None, :]
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    total_grad_ptr,  # None: nothing else uses the sum, if there is one.
    x_grad_ptr,
    partial_ptr,  # [programs, D], or None: the weight's gradient is unwanted.
    N,
    grad_stride,
    x_stride,
    total_grad_stride,
    D: tl.constexpr,
    eps: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    wide = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0).to(wide)[None, :]
    partial = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for block in range(program, tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < N)[:, None] & (column < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0).to(wide)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=inside, other=0).to(wide)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x_hat = x * scale
        if partial_ptr is not None:
            partial += grad * x_hat.to(dtype).to(wide)
        grad *= weight
        x_grad = (grad - x_hat * (tl.sum(grad * x_hat, 1) / D)[:, None]) * scale
        if total_grad_ptr is not None:
            total_grad = tl.load(
                total_grad_ptr + row[:, None] * total_grad_stride + column[None, :], mask=inside, other=0
            )
            x_grad += total_grad.to(wide)
        tl.store(x_grad_ptr + row[:, None] * D + column[None, :], x_grad.to(dtype), mask=inside)
    if partial_ptr is not None:
        tl.store(partial_ptr + program * D + column, tl.sum(partial, 0), mask=column < D)
