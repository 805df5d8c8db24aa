"""`rotary` by `native.cpp`."""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.rotary`. Differentiable once; `cos` and `sin` must not require gradients."""
    return torch.ops.creche_native.rotary(q, k, cos, sin)
