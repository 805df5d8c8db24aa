"""An autograd node whose gradients were computed in the forward pass."""

from typing import Any

import torch
from torch import Tensor


class LossWithGradients(torch.autograd.Function):
    """A loss whose gradients are known. Backward returns them times the incoming gradient, once, and frees them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        """Returns the loss. gradients[k] is d loss / d inputs[k], in the dtype it was summed in; None if unwanted."""
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the inputs' gradients.

        Raises:
            RuntimeError: This is a second call, or a graph of the backward pass is requested. Returning constants then,
                as `once_differentiable` does when the incoming gradient is one, would silently drop second-order terms.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_ensemble_kl is differentiable once: run its backward without create_graph, or build the loss"
                " from ensemble_kl with the reference backend, which is differentiable twice"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was already called on this loss of linear_ensemble_kl, which then freed its gradients: sum"
                " everything that depends on the loss into one backward, or call linear_ensemble_kl again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        (output_gradient,) = output_gradients
        # Some gradients are transposed. The pass that casts them also makes them contiguous for all later readers.
        input_gradients = (
            None if x is None else x.mul_(output_gradient).to(dtype, memory_format=torch.contiguous_format)
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, None, *input_gradients
