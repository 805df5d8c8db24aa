"""Measures a backend's error against float64 and compares it with plain torch's error."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from kernels import Projected
from kernels.ops.ensemble_kl.reference import loss_and_grad
from kernels.ops.linear_ensemble_kl import reference


def assert_near(ours: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """Asserts that the error of `ours` is at most 3 times that of `plain`, in the same dtype. `exact` is float64.

    Plain torch's error counts as at least a rounding of the largest value, because it is sometimes exact by luck.
    """
    assert ours.dtype == plain.dtype
    error, theirs = ((x - exact).abs().max().item() for x in (ours, plain))
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
    assert error <= 3 * max(theirs, rounding), f"{what}: {error:.3g}, plain torch {theirs:.3g}"


@contextmanager
def stored_gradients(students: Sequence[Projected]) -> Iterator[None]:
    """Makes the reference of `linear_ensemble_kl`, which computes in fp32, round the gradients of the logits to the
    dtype of their products' other operands: that of hidden states and head, or fp32 where these differ.
    """
    stored = [h.dtype if h.dtype == w.dtype else torch.float32 for h, w, _ in students]

    def rounded(*arguments, **options):
        ce, kl, gradients = loss_and_grad(*arguments, **options)
        return ce, kl, [g if g is None else g.to(dtype).float() for g, dtype in zip(gradients, stored, strict=True)]

    with mock.patch.object(reference, "loss_and_grad", rounded):
        yield
