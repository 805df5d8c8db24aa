"""What a backend's results are measured by: float64, and plain torch's error."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from kernels import Projected, TopK
from kernels.ops.ensemble_kl.reference import loss_and_grad
from kernels.ops.linear_ensemble_kl import reference


def assert_near(ours: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """`ours` errs at most 3 times as much as `plain`, of the same dtype; `exact` is in float64. Plain torch's error is
    taken to be no less than a rounding of the largest value, since it is now and then exact by luck.
    """
    assert ours.dtype == plain.dtype
    error, theirs = ((x - exact).abs().max().item() for x in (ours, plain))
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
    assert error <= 3 * max(theirs, rounding), f"{what}: {error:.3g}, plain torch {theirs:.3g}"


@contextmanager
def stored_gradients(students: Sequence[Projected | TopK]) -> Iterator[None]:
    """Within, the reference of `linear_ensemble_kl`, which is in fp32 throughout, keeps the gradients of the logits as
    their products' other operands are: in the dtype of hidden states and head, in fp32 where these differ.
    """
    stored = [h.dtype if h.dtype == w.dtype else torch.float32 for h, w, _ in students]

    def rounded(*arguments, **options):
        ce, kl, gradients = loss_and_grad(*arguments, **options)
        return ce, kl, [g if g is None else g.to(dtype).float() for g, dtype in zip(gradients, stored, strict=True)]

    with mock.patch.object(reference, "loss_and_grad", rounded):
        yield
