from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import launch
from kernels.ops.rms_norm import reference, triton
from tests.kernels.ops.triton.agreement import DEVICE, assert_agrees, expanded, packed, scattered, sliced

SHAPES = [(1, 2), (1, 7), (3, 5, 48), (7, 1000), (9, 1024), (2, 2049), (64, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype=torch.float32, residual=False):
    torch.manual_seed(0)
    x, other = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=DEVICE).to(dtype)
    return [x, weight, other] if residual else [x, weight]


def ours(x, weight, residual=None) -> Any:
    return triton.rms_norm(x, weight, 1e-5, residual)


def plain(x, weight, residual=None) -> Any:
    return reference.rms_norm(x, weight, 1e-5, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", [False, True])
def test_agrees_with_float64(shape, dtype, residual):
    assert_agrees(ours, plain, make(shape, dtype, residual))


@pytest.mark.parametrize("view", [packed, scattered])
@pytest.mark.parametrize("cotangent", [sliced, expanded])
def test_strides(view, cotangent):
    assert_agrees(ours, plain, make((2, 3, 40), residual=True), view, cotangent)


def test_float64_and_mixed_dtypes():
    inputs = [x.double() for x in make((3, 50), residual=True)]
    for a, b in zip(ours(*inputs), plain(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    x, weight = make((3, 50), torch.bfloat16)
    assert_agrees(ours, plain, [x, weight.float()])


def test_one_column():
    """The gradient of one column is 0 except for eps, so that only roundings remain after cancellation."""
    inputs = [x.requires_grad_() for x in make((3, 1))]
    actual, want = (torch.autograd.grad(function(*inputs).sum(), inputs) for function in (ours, plain))
    for a, b in zip(actual, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_weight_gradient_over_many_rows_repeats_bitwise(monkeypatch):
    monkeypatch.setattr(launch, "RMS_NORM_PARTIALS", 2)
    inputs = make((75, 300))
    assert_agrees(ours, plain, inputs)
    first, second = (
        torch.autograd.grad(ours(*leaves).square().sum(), leaves)
        for leaves in [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_gradients_that_are_not_wanted():
    x, weight, residual = make((3, 16), residual=True)
    (grad,) = torch.autograd.grad(ours(x.requires_grad_(), weight).sum(), x)
    (want,) = torch.autograd.grad(plain(x, weight).sum(), x)
    torch.testing.assert_close(grad, want)
    weight.requires_grad_()
    total_only = torch.autograd.grad(ours(x, weight, residual)[1].sum(), [x, weight], allow_unused=True)
    assert torch.equal(total_only[0], torch.ones_like(x))
    assert total_only[1] is None
    normed_only = torch.autograd.grad(ours(x, weight, residual)[0].sum(), [x, weight])
    for a, b in zip(normed_only, torch.autograd.grad(plain(x, weight, residual)[0].sum(), [x, weight]), strict=True):
        torch.testing.assert_close(a, b)


def test_no_rows_and_rows_too_long():
    x, weight = torch.zeros(0, 4, device=DEVICE, requires_grad=True), torch.ones(4, device=DEVICE, requires_grad=True)
    for grad in torch.autograd.grad(ours(x, weight).sum(), [x, weight]):
        assert not grad.any()
    with pytest.raises(ValueError, match="x has 20000 columns: expected at most 16384"):
        ours(*make((1, 20000)))


@pytest.mark.parametrize("residual", [False, True])
def test_a_second_derivative_is_refused(residual):
    leaves = [x.requires_grad_() for x in make((3, 8), residual=residual)]
    outputs = ours(*leaves)
    first = torch.autograd.grad(outputs[0].square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), leaves[1])


def test_torch_compile_traces_it():
    inputs = [x.requires_grad_() for x in make((4, 24), residual=True)]

    def loss(*inputs):
        normed, total = ours(*inputs)
        return (normed * total).sum() + ours(total, inputs[1]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_auto_takes_it_for_cuda_tensors_with_no_gpu():
    with FakeTensorMode(), kernels.backend("auto"):
        x, weight = torch.empty(2, 3, 16, device="cuda", dtype=torch.bfloat16), torch.empty(16, device="cuda")
        normed, total = kernels.rms_norm(x, weight, residual=x)
    assert (normed.dtype, total.dtype, normed.shape) == (torch.float32, torch.bfloat16, x.shape)
