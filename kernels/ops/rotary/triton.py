"""Rotary position embedding in Triton. One launch rotates queries and (grouped) keys, and reads and writes each element
once.

Shapes: B sequences, L positions, H query heads, H_kv key heads, P = D_head / 2 pairs.

A program takes a few tokens with all their heads, so that the angles are read once per token. A rotation is linear, and
its gradient is the opposite rotation: the same kernel with −sin. So the op is its own derivative, of any order.

The backward pass does not overwrite the incoming gradients. Autograd may have given the same memory to other functions
(the backward of a sum does), no public API tells, and working in place would move as many bytes.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.registration import op


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.rotary`. The angles must be constants.

    Raises:
        ValueError: The dtypes of q and k differ, or the angles require a gradient.
    """
    if k.dtype != q.dtype:
        raise ValueError(f"k has dtype {k.dtype}: expected q's {q.dtype}; cast it, or choose backend 'reference'")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError(
            "cos or sin requires a gradient: expected constants; detach them, or choose backend 'reference'"
        )
    return run(q, k, cos, sin, False)


@op("rotary")
def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Rotates q and k, or with `back` in the opposite direction."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() or k.numel():
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        B, L = q.shape[:2]
        constants = _constants(*q.shape[2:], k.shape[2], back)
        with torch.cuda.device_of(q):
            _kernel[(launch.blocks(B * L, constants["BLOCK_N"]),)](
                q,
                k,
                cos.contiguous(),
                sin.contiguous(),
                q_out,
                k_out,
                B * L,
                L,
                q.stride(),
                k.stride(),
                **constants,
            )
    return q_out, k_out


run.register_fake(lambda q, k, cos, sin, back: (q.new_empty(q.shape), k.new_empty(k.shape)))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


run.register_autograd(
    lambda ctx, q_grad, k_grad: (*run(q_grad, k_grad, *ctx.saved_tensors, not ctx.back), None, None, None),
    setup_context=_save,
)


@functools.cache
def _constants(H: int, width: int, H_kv: int, back: bool) -> dict[str, Any]:
    P = width // 2
    block_h, block_p = launch.power_of_2(H + H_kv), launch.power_of_2(P)
    chosen = launch.rows(block_h * block_p, most_warps=16)
    return {
        "H": H,
        "H_KV": H_kv,
        "P": P,
        "BACK": back,
        "BLOCK_N": chosen.block // (block_h * block_p),
        "BLOCK_H": block_h,
        "BLOCK_P": block_p,
        "num_warps": chosen.warps,
    }


@triton.jit
def _kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    N,
    L,
    q_strides,
    k_strides,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    P: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    dtype = q_ptr.dtype.element_ty
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
    n, sequence, position = token.to(tl.int64), (token // L).to(tl.int64), (token % L).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[None, :, None]  # The query heads come first, then the key heads.
    pair = tl.arange(0, BLOCK_P)[None, None, :]
    inside = (n < N) & (pair < P)

    cos = tl.load(cos_ptr + position * P + pair, mask=inside, other=0).to(wide)
    sin = tl.load(sin_ptr + position * P + pair, mask=inside, other=0).to(wide)
    if BACK:
        sin = -sin

    is_q = inside & (head < H)
    is_k = inside & (head >= H) & (head < H + H_KV)
    q_ptr += sequence * q_strides[0] + position * q_strides[1] + head * q_strides[2] + pair
    k_ptr += sequence * k_strides[0] + position * k_strides[1] + (head - H) * k_strides[2] + pair
    first = tl.where(head < H, tl.load(q_ptr, mask=is_q, other=0), tl.load(k_ptr, mask=is_k, other=0)).to(wide)
    second = tl.where(head < H, tl.load(q_ptr + P, mask=is_q, other=0), tl.load(k_ptr + P, mask=is_k, other=0)).to(wide)
    new_first = (first * cos - second * sin).to(dtype)
    new_second = (second * cos + first * sin).to(dtype)

    q_out_ptr += (n * H + head) * (2 * P) + pair
    k_out_ptr += (n * H_KV + head - H) * (2 * P) + pair
    tl.store(q_out_ptr, new_first, mask=is_q)
    tl.store(q_out_ptr + P, new_second, mask=is_q)
    tl.store(k_out_ptr, new_first, mask=is_k)
    tl.store(k_out_ptr + P, new_second, mask=is_k)
