"""Kernels launched from Python as torch ops: registered for tracers, called without a detour by everyone else.

A custom op of torch's is one that torch.compile neither enters nor breaks at. Its layers in Python take longer than a
small kernel runs, though, so that a GPU would wait for its host. Plain tensors outside a tracer therefore go through an
`autograd.Function` of the same three functions, or, where nothing is to be differentiated, through none.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, library

Inputs = Sequence[Any]
Returning = TypeVar("Returning", bound=Callable[..., Any])


class Op:
    """An op of the namespace `creche_triton`; `op(name)` makes one of the function that computes it.

    Its inputs are positional: tensors, lists of tensors, None and numbers. It is differentiable where
    `register_autograd` says how; else its derivative is refused, so that a second one cannot be silently wrong.
    """

    def __init__(self, name: str, compute: Callable[..., Any]) -> None:
        self._name, self._compute = name, compute
        self._traced = library.custom_op(f"creche_triton::{name}", compute, mutates_args=())
        self.register_fake = self._traced.register_fake
        self.register_autograd(self._refuse, lambda ctx, inputs, output: None)

    def register_autograd(self, differentiate: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As a custom op's: `setup_context(ctx, inputs, output)` saves, `differentiate(ctx, *gradients)` returns one
        gradient per input, a list for a list. Of `ctx.needs_input_grad` neither may make use where an input is a list.
        """
        self._traced.register_autograd(differentiate, setup_context=setup_context)
        self._function = _function(self._compute, differentiate, setup_context)

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_plain(inputs):
            return self._traced(*inputs)
        if not torch.is_grad_enabled():
            return self._compute(*inputs)
        lengths = [len(x) if isinstance(x, list) else None for x in inputs]
        return self._function.apply(*_flat(inputs), lengths)

    def _refuse(self, ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{self._name}'s Triton backend is differentiable once: for second derivatives choose"
            " kernels.backend('reference')"
        )


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    return lambda compute: Op(name, compute)


def _function(
    compute: Callable[..., Any], differentiate: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        # One `forward` with ctx: with a `setup_context` of its own, torch inspects the signature at every call.
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *flat, lengths = arguments
            remaining = iter(flat)
            inputs = [next(remaining) if n is None else [next(remaining) for _ in range(n)] for n in lengths]
            output = compute(*inputs)
            setup_context(ctx, inputs, output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            made = differentiate(ctx, *gradients)
            return *_flat(made if isinstance(made, tuple) else (made,)), None

    return Function


def _flat(inputs: Inputs) -> list[Any]:
    return [x for item in inputs for x in (item if isinstance(item, list) else (item,))]


def _is_plain(inputs: Inputs) -> bool:
    """Whether the first tensor among them holds numbers of its own, as tracers' subclasses of Tensor do not."""
    for x in inputs:
        if isinstance(x, Tensor):
            return type(x) is Tensor or type(x) is torch.nn.Parameter
        if isinstance(x, list) and x:
            return _is_plain(x)
    return False


def constant_when_traced(function: Returning) -> Returning:
    """Have tracers take what `function` returns as a constant, as `torch.compiler.assume_constant_result` does: that
    imports the whole compiler first, two seconds of whoever imports this package and compiles nothing."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function
