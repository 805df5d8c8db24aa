"""Attention on a CPU, by `native.cpp`."""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """See `kernels.attention`. It is differentiable once."""
    return torch.ops.creche_native.attention(q, k, v, causal)
