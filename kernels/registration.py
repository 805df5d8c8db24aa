"""Registers kernels that Python launches as torch ops, which tracers see and everyone else calls directly.

torch.compile neither enters nor breaks at a custom op of torch's. But its layers in Python take longer than a small
kernel runs, so that a GPU would wait for its host. Outside a tracer, plain tensors therefore go through an
`autograd.Function` with the same three functions, or directly to the kernel if nothing is to be differentiated.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, library

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


class Op:
    """An op of the namespace `creche_triton`. `op(name)` turns the function that computes it into one.

    Its inputs are positional: tensors, lists of tensors, None and numbers. `register_autograd` makes it differentiable.
    Without that, asking for its derivative raises, so that a second derivative is never silently wrong.
    """

    def __init__(self, name: str, compute: Callable[..., Any]) -> None:
        self._name, self._compute = name, compute
        self._traced = library.custom_op(f"creche_triton::{name}", compute, mutates_args=())
        self.register_fake = self._traced.register_fake
        self.register_autograd(self._refuse, lambda ctx, inputs, output: None)

    def register_autograd(self, differentiate: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Registers the derivative as for a custom op: `setup_context(ctx, inputs, output)` saves what is needed, and
        `differentiate(ctx, *gradients)` returns one gradient per input, and a list of them for a list. Neither can use
        `ctx.needs_input_grad` if an input is a list.
        """
        self._traced.register_autograd(differentiate, setup_context=setup_context)
        compute = self._compute

        class Function(torch.autograd.Function):
            # `forward` takes ctx, because with a separate `setup_context` torch inspects the signature at every call.
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                *flat, lengths = arguments
                remaining = iter(flat)
                inputs = [next(remaining) if n is None else [next(remaining) for _ in range(n)] for n in lengths]
                output = compute(*inputs)
                setup_context(ctx, inputs, output)
                return tuple(output) if isinstance(output, list) else output

            @staticmethod
            def backward(ctx: Any, *output_gradients: Tensor | None) -> Any:
                gradients = differentiate(ctx, *output_gradients)
                return *_flatten(gradients if isinstance(gradients, tuple) else (gradients,)), None

        self._function = Function

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_plain(inputs):
            return self._traced(*inputs)
        if not torch.is_grad_enabled():
            return self._compute(*inputs)
        lengths = [len(x) if isinstance(x, list) else None for x in inputs]
        return self._function.apply(*_flatten(inputs), lengths)

    def _refuse(self, ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{self._name}'s Triton backend is differentiable once: for second derivatives choose"
            " kernels.backend('reference')"
        )


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    return lambda compute: Op(name, compute)


def _flatten(inputs: Sequence[Any]) -> list[Any]:
    return [x for item in inputs for x in (item if isinstance(item, list) else (item,))]


def _is_plain(inputs: Sequence[Any]) -> bool:
    """Returns whether the first tensor among the inputs holds numbers, as tracers' subclasses of Tensor do not."""
    for x in inputs:
        if isinstance(x, Tensor):
            return type(x) is Tensor or type(x) is torch.nn.Parameter
        if isinstance(x, list) and x:
            return _is_plain(x)
    return False


def constant_when_traced(function: AnyFunction) -> AnyFunction:
    """Makes tracers take what `function` returns as a constant, as `torch.compiler.assume_constant_result` does. That
    one imports the whole compiler first, which takes two seconds even in processes that compile nothing.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function
