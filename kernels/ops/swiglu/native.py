"""`swiglu` by `native.cpp`."""

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `kernels.swiglu`. Differentiable once."""
    return torch.ops.creche_native.swiglu(gate, up)
