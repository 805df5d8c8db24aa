"""Root-mean-square normalisation on a CPU, by `native.cpp`."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """See `kernels.rms_norm`. It is differentiable once."""
    if residual is None:
        return torch.ops.creche_native.rms_norm(x, weight, eps)
    return torch.ops.creche_native.add_rms_norm(x, residual, weight, eps)
