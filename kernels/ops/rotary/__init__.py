"""Rotary position embedding.

Shapes: B sequences, L positions, H query heads, H_kv key heads.
"""

from torch import Tensor

from kernels import dispatch


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions (Su et al. 2021, eq. 34), in LLaMA's "rotate-half" layout: component
    d is paired with d + D_head/2, and pair d turns by the angle whose cosine and sine are cos[:, d] and sin[:, d].

    The arithmetic is in fp32 (float64 stays float64); the results have the dtypes of q and k.

    Args:
        q: [B, L, H, D_head], D_head even.
        k: [B, L, H_kv, D_head].
        cos, sin: [L, D_head / 2], one column per pair (not Hugging Face's [L, D_head], which repeats them); best in
            fp32, since bf16 angles are wrong by 0.4%.

    Returns:
        The rotated (q, k).

    Raises:
        ValueError: shapes that do not match.
    """
    if q.ndim != 4 or q.shape[-1] % 2:
        raise ValueError(f"q has shape {tuple(q.shape)}: expected [B, L, H, D_head] with an even D_head")
    if k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has shape {tuple(k.shape)}: expected [B, L, H_kv, D_head] to match q's {tuple(q.shape)}")
    expected = (q.shape[1], q.shape[-1] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != expected:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: expected [L, D_head / 2] = {expected};"
                " slice it to the L positions in use, one column per pair"
            )
    return dispatch.implementation("rotary", q).rotary(q, k, cos, sin)
