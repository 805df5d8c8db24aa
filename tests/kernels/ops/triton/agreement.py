"""Compares Triton kernels with float64.

A kernel's error may be 3 times that of plain torch (`reference.py`) in the same storage dtype, as in `yardstick.py`.

Triton's interpreter is wrong in bf16. Its arithmetic takes the bits for integers (the kernels convert to fp32 first, so
this does not matter), and its casts from fp32 truncate where a GPU rounds to the nearest even.
`honest_memory_and_casts` replaces these casts by torch's rounding, and fills newly allocated memory with NaN.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.yardstick import assert_near

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def rows(few: int) -> int:
    """Returns a number of tokens: few in the slow interpreter, more on a GPU, so that no largest error is luck."""
    return few if DEVICE == "cpu" else 12 * few


Function = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_agrees(
    ours: Function,
    plain: Function,
    inputs: Sequence[Tensor],
    view: Callable[[Tensor], Tensor] = torch.clone,
    cotangent: Callable[[Tensor], Tensor] = torch.randn_like,
) -> None:
    """Asserts that outputs and gradients of ours(*inputs) are as near to float64 as plain's in the inputs' dtypes are.

    `view` gives our inputs other strides, and `cotangent` makes the gradients of the outputs.
    """
    dtypes = [x.dtype for x in inputs]
    exact_outputs = _outputs(plain, [x.double() for x in inputs])
    torch.manual_seed(1)
    cotangents = [cotangent(x) for x in _outputs(plain, inputs)]
    exact = exact_outputs + _gradients(plain, [x.double() for x in inputs], [g.double() for g in cotangents])
    theirs = _outputs(plain, inputs) + _gradients(plain, inputs, cotangents)
    viewed = [view(x) for x in inputs]
    with honest_memory_and_casts():
        mine = _outputs(ours, viewed) + _gradients(ours, viewed, cotangents)
    for k, (a, b, c) in enumerate(zip(mine, theirs, exact, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if not c.numel():
            continue
        assert_near(a, b, c, f"result {k} of {dtypes}")


@contextmanager
def honest_memory_and_casts() -> Iterator[None]:
    cast = InterpreterBuilder.cast_impl

    def round_to_nearest(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.tensor(src.data).bfloat16().view(torch.int16).numpy().view("uint16")
        return TensorHandle(rounded, tl.bfloat16)

    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then returns NaN.
    try:
        with mock.patch.object(InterpreterBuilder, "cast_impl", round_to_nearest):
            assert torch.empty(3).isnan().all()
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _outputs(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        outputs = function(*inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _gradients(function: Function, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    return list(torch.autograd.grad(outputs, leaves, cotangents))


def packed(x: Tensor) -> Tensor:
    """Returns x as a slice of a wider tensor, whose rows are an odd number of elements long and not on 16 bytes."""
    wider = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wider[..., 1:-2] = x
    return wider[..., 1:-2]


def scattered(x: Tensor) -> Tensor:
    """Returns x with its dimensions in the opposite order in memory, so that no columns are adjacent."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def expanded(x: Tensor) -> Tensor:
    """Returns a gradient as `.sum()` gives it: one number in memory."""
    return torch.randn((), device=x.device).to(x.dtype).expand(x.shape)


def sliced(x: Tensor) -> Tensor:
    """Returns a gradient with gaps between its rows, as `torch.cat` gives it."""
    return packed(torch.randn_like(x))
