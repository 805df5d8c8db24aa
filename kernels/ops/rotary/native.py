"""Rotary position embedding on a CPU, by `native.cpp`."""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.rotary`. It is differentiable once, but not in `cos` and `sin`."""
    return torch.ops.creche_native.rotary(q, k, cos, sin)
