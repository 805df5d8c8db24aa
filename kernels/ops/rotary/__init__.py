"""Rotary position embedding.

Shapes: B sequences, L positions, H query heads, H_kv key heads.
"""

from torch import Tensor

from kernels import dispatch


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions (Su et al. 2021, eq. 34), in LLaMA's "rotate-half" layout: component
    d is paired with d + D_head/2, and pair d turns by the angle whose cosine and sine are cos[:, d] and sin[:, d].

    It computes in fp32 (float64 stays float64). The results have the dtypes of q and k.

    Args:
        q: [B, L, H, D_head]. D_head is even.
        k: [B, L, H_kv, D_head].
        cos, sin: [L, D_head / 2], with one column per pair (Hugging Face's [L, D_head] repeats them). Pass fp32,
            because bf16 angles are wrong by 0.4%.

    Raises:
        ValueError: The shapes do not match.
    """
    if q.ndim != 4 or q.shape[-1] % 2:
        raise ValueError(f"q has shape {tuple(q.shape)}: expected [B, L, H, D_head] with an even D_head; reshape it")
    if k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}: expected [B, L, H_kv, D_head] with q's B, L and D_head {tuple(q.shape)}"
        )
    expected = (q.shape[1], q.shape[-1] // 2)
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape != expected:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: expected [L, D_head / 2] = {expected};"
                " slice it to the L positions in use, with one column per pair"
            )
    return dispatch.implementation("rotary", q).rotary(q, k, cos, sin)
