import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels.ops.swiglu import reference, triton
from tests.kernels.ops.triton.agreement import DEVICE, assert_agrees, expanded, packed, scattered, sliced


def make(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (1, 7), (2, 3, 48), (7, 1001), (2, 2048), (3, 2049)])
def test_agrees_with_float64(shape, dtype):
    assert_agrees(triton.swiglu, reference.swiglu, make(shape, dtype))


@pytest.mark.parametrize("view", [packed, scattered])
@pytest.mark.parametrize("cotangent", [sliced, expanded])
def test_strides(view, cotangent):
    assert_agrees(triton.swiglu, reference.swiglu, make((2, 3, 40)), view, cotangent)


def test_halves_of_one_projection_longer_than_a_block():
    torch.manual_seed(0)
    both = torch.randn(3, 2 * 2500, device=DEVICE)

    def halves(function):
        return lambda both: function(*both.chunk(2, dim=-1))

    assert_agrees(halves(triton.swiglu), halves(reference.swiglu), [both])


def test_large_gates_and_float64():
    gate = torch.tensor([-1e4, -100.0, -0.0, 100.0, 1e4], device=DEVICE, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        inputs = [gate.to(dtype).requires_grad_(), torch.full_like(gate, 3, dtype=dtype).requires_grad_()]
        for a, b in zip(
            torch.autograd.grad(triton.swiglu(*inputs).sum(), inputs),
            torch.autograd.grad(reference.swiglu(*inputs).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
    inputs = [x.double() for x in make((3, 50))]
    torch.testing.assert_close(triton.swiglu(*inputs), reference.swiglu(*inputs), rtol=1e-14, atol=1e-14)


def test_empty_tensors():
    gate, up = (torch.zeros(0, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    triton.swiglu(gate, up).sum().backward()
    assert gate.grad is not None
    assert gate.grad.shape == (0, 4)


def test_a_second_derivative_is_refused():
    gate, up = (x.requires_grad_() for x in make((3, 8)))
    (first,) = torch.autograd.grad(triton.swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), up)


def test_torch_compile_traces_it():
    inputs = [x.requires_grad_() for x in make((4, 24))]

    def loss(gate, up):
        return triton.swiglu(gate, up).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_auto_takes_it_for_cuda_tensors_with_no_gpu():
    with FakeTensorMode(), kernels.backend("auto"):
        gate = torch.empty(2, 3, 16, device="cuda", dtype=torch.bfloat16)
        out = kernels.swiglu(gate, gate)
    assert (out.dtype, out.shape) == (gate.dtype, gate.shape)
