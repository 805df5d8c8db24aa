"""The gated activation on a CPU, by `native.cpp`."""

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `kernels.swiglu`. It is differentiable once."""
    return torch.ops.creche_native.swiglu(gate, up)
