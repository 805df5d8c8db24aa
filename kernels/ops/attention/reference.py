"""The definition of `attention`: torch's scaled_dot_product_attention."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """See `kernels.attention`. Under torch's `sdpa_kernel(SDPBackend.MATH)` it has second and forward derivatives."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
