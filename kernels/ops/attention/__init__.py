"""Scaled dot-product attention.

Shapes: B sequences, L positions, H query heads, H_kv key and value heads.
"""

from torch import Tensor

from kernels import dispatch
from kernels.ops.attention import flash, native, reference


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, dropout: float = 0.0, segments: Tensor | None = None
) -> Tensor:
    """`softmax(q kᵀ / sqrt(D_head)) v` (Vaswani et al. 2017, eq. 1), with grouped queries (Ainslie et al. 2023): query
    head h reads key and value head h // (H / H_kv).

    flash-attn runs where it is installed and fits (`flash.usable`), the native kernel on a CPU where it fits
    (`native.usable`), unless the backend is "reference"; torch's `scaled_dot_product_attention`, itself a choice of
    fused kernels, runs everywhere else, under every backend.

    Args:
        q: [B, L, H, D_head].
        k, v: [B, L, H_kv, D_head], H a multiple of H_kv.
        causal: position l attends to positions ≤ l only.
        dropout: the probability with which an attention weight is dropped; pass 0 when evaluating. Drawn from torch's
            generator.
        segments: [B, L] integers. Positions attend within their own segment only (packed documents). Below 0 is
            padding, whose output is 0.

    Returns:
        [B, L, H, D_head], in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not match, dropout outside [0, 1).
    """
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected four dimensions, [B, L, H, D_head]")
    (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, length, kv_heads, width) or x.dtype != q.dtype:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}: expected [B, L, H_kv, D_head] ="
                f" [{batch}, {length}, H_kv, {width}] {q.dtype}, H_kv the same for k and v"
            )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}: expected a multiple; change one of the two")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: expected a probability in [0, 1)")
    if segments is not None and (
        segments.shape != (batch, length) or segments.is_floating_point() or segments.is_complex()
    ):
        raise ValueError(
            f"segments is {tuple(segments.shape)} {segments.dtype}: expected integers, [B, L] = [{batch}, {length}]"
        )
    if dispatch.current() != "reference" and flash.usable(q, segments):
        return flash.attention(q, k, v, causal, dropout)
    if dispatch.current() in ("auto", "native") and q.device.type == "cpu" and native.usable(dropout, segments):
        return dispatch.implementation("attention", q).attention(q, k, v, causal, dropout, segments)
    return reference.attention(q, k, v, causal, dropout, segments)
