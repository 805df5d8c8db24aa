"""Scaled dot-product attention.

Shapes: B sequences, L positions, H query heads, H_kv key and value heads.
"""

from torch import Tensor

from kernels import dispatch
from kernels.ops.attention import flash, reference


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """Computes `softmax(q kᵀ / sqrt(D_head)) v` (Vaswani et al. 2017, eq. 1) with grouped queries (Ainslie et al.
    2023): query head h reads key and value head h // (H / H_kv).

    flash-attn runs where it is installed and supports the inputs (`flash.usable`), and the native kernel runs on a CPU,
    unless the backend is "reference". Everywhere else, and under every backend, torch's `scaled_dot_product_attention`
    runs, which itself chooses among fused kernels.

    Args:
        q: [B, L, H, D_head].
        k, v: [B, L, H_kv, D_head]. H is a multiple of H_kv.
        causal: Position l attends only to positions up to l.

    Returns:
        [B, L, H, D_head], in q's dtype.

    Raises:
        ValueError: The shapes or dtypes do not match.
    """
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: expected four dimensions, [B, L, H, D_head]; reshape it"
            )
    (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, length, kv_heads, width) or x.dtype != q.dtype:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}: expected [B, L, H_kv, D_head] ="
                f" [{batch}, {length}, H_kv, {width}] {q.dtype}, with the same H_kv for k and v"
            )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q has {heads} heads and k has {kv_heads}: expected a multiple; change one of the two numbers of heads"
        )
    if dispatch.current() != "reference" and flash.usable(q):
        return flash.attention(q, k, v, causal)
    if dispatch.current() in ("auto", "native") and q.device.type == "cpu":
        return dispatch.implementation("attention", q).attention(q, k, v, causal)
    return reference.attention(q, k, v, causal)
