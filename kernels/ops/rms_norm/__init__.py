"""Root-mean-square normalisation."""

from typing import overload

from torch import Tensor

from kernels import dispatch


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes `x / sqrt(mean(x²) + eps) * weight` over the last dimension (Zhang & Sennrich 2019, eq. 4).

    It normalises in fp32 (float64 stays float64), rounds to x's dtype, and then multiplies by the weight. This is
    LLaMA's order of casts.

    Args:
        x: [..., D], floating point.
        weight: [D].
        eps: A number above 0, which is added to the mean square.
        residual: [..., D], like x. With it, the input is `x + residual`.

    Returns:
        [..., D], or with a residual the pair (normed, x + residual).

    Raises:
        ValueError: The shapes or dtypes do not match, or eps ≤ 0.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: expected a floating-point dtype; cast it first")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected {tuple(x.shape[-1:])}, x's last dimension")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype}: expected x's {tuple(x.shape)} {x.dtype};"
            " reshape or cast it"
        )
    if not eps > 0:
        raise ValueError(f"eps is {eps}: expected a number above 0, such as 1e-6")
    return dispatch.implementation("rms_norm", x).rms_norm(x, weight, eps, residual)
