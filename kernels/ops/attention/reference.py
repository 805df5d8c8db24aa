"""The definition of `attention`: torch's scaled_dot_product_attention.

Shapes: B sequences, L positions, H query heads, H_kv key and value heads.
"""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, segments: Tensor | None) -> Tensor:
    """See `kernels.attention`. Differentiable twice, and forward, under torch's `sdpa_kernel(SDPBackend.MATH)`."""
    mask = None if segments is None else _mask(segments, causal)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    return out if segments is None else out.masked_fill((segments < 0)[:, :, None, None], 0)


def _mask(segments: Tensor, causal: bool) -> Tensor:
    """[B, 1, L, L], true where row attends to column. Padding attends to padding, so that no row is empty (NaN)."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril() if causal else same
