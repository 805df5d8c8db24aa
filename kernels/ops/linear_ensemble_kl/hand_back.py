"""The autograd node that hands back gradients computed in the forward pass."""

from typing import Any

import torch
from torch import Tensor


class HandBack(torch.autograd.Function):
    """A loss whose gradients are known: backward returns them times the incoming gradient, once, and frees them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        """`gradients[k]` is d loss / d inputs[k], in the dtype it was summed in, or None where it is not wanted."""
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Raises RuntimeError on a second call, and where a graph of the backward is asked for: returning constants, as
        `once_differentiable` does when the incoming gradient is one, would drop second-order terms silently.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_ensemble_kl is differentiable once: run its backward without create_graph, or build the loss"
                " from ensemble_kl with the reference backend, which is differentiable twice"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss of linear_ensemble_kl has handed its gradients back already: sum what depends on it into one"
                " backward, or call linear_ensemble_kl again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        (cotangent,) = cotangents
        # Some come transposed: straightened here, in the pass that casts, they are not walked across ever after.
        handed = (
            None if gradient is None else gradient.mul_(cotangent).to(dtype, memory_format=torch.contiguous_format)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, None, *handed
