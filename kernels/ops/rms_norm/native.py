"""Root-mean-square normalisation on a CPU, by `native.cpp`."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """See `kernels.rms_norm`. It is differentiable once."""
    outputs = torch.ops.creche_native.rms_norm(x, weight, eps, residual)
    return outputs[0] if residual is None else tuple(outputs)
