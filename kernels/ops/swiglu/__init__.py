"""The gated activation of LLaMA's feed-forward layer."""

from torch import Tensor

from kernels import dispatch


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes `silu(gate) * up` (Shazeer 2020, "GLU variants improve transformer", eq. 5, without the projections).

    It computes in fp32 (float64 stays float64) and rounds once to the inputs' dtype.

    Args:
        gate, up: [..., D], of one shape and one floating-point dtype.

    Raises:
        ValueError: The shapes or dtypes differ.
    """
    if not gate.is_floating_point():
        raise ValueError(f"gate has dtype {gate.dtype}: expected a floating-point dtype; cast it first")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"up is {tuple(up.shape)} {up.dtype}: expected gate's {tuple(gate.shape)} {gate.dtype}; reshape or cast it"
        )
    return dispatch.implementation("swiglu", gate).swiglu(gate, up)
