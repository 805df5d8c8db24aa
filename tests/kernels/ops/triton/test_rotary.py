import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels.ops.rotary import reference, triton
from tests.kernels.ops.triton.agreement import DEVICE, assert_agrees, expanded, packed, scattered, sliced


def make(B=2, L=5, H=4, H_kv=2, D_head=16, dtype=torch.float32):
    torch.manual_seed(0)
    q, k = (torch.randn(B, L, heads, D_head, device=DEVICE).to(dtype) for heads in (H, H_kv))
    angle = torch.randn(L, D_head // 2, device=DEVICE)
    return [q, k], (angle.cos(), angle.sin())


def with_angles(function, angles):
    return lambda q, k: function(q, k, *angles)


def check(inputs, angles, *options):
    assert_agrees(with_angles(triton.rotary, angles), with_angles(reference.rotary, angles), inputs, *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"B": 1, "L": 1, "H": 1, "H_kv": 1, "D_head": 2},
        {"H": 3, "H_kv": 1, "D_head": 6},
        {"B": 3, "L": 7, "H": 12, "H_kv": 4, "D_head": 64},
        {"H": 2, "H_kv": 5, "D_head": 34},
        {"L": 3, "H": 33, "H_kv": 7, "D_head": 128},
    ],
)
def test_agrees_with_float64(shape, dtype):
    check(*make(**shape, dtype=dtype))


def heads_first(x):
    """Returns x as [B, H, L, D_head] in memory, which attention reads fastest."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("view", [packed, scattered, heads_first])
@pytest.mark.parametrize("cotangent", [sliced, expanded])
def test_strides(view, cotangent):
    check(*make(), view, cotangent)


def test_heads_of_one_projection_and_a_longer_table():
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, (4 + 2 + 2) * 8, device=DEVICE)
    angles = [x.T for x in torch.randn(2, 4, 9, device=DEVICE)]  # The columns are adjacent, for 9 positions.

    def heads(function):
        def rotate(qkv):
            q, k, _ = qkv.split([32, 16, 16], dim=-1)
            return function(q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8)), *(x[:5] for x in angles))

        return rotate

    assert_agrees(heads(triton.rotary), heads(reference.rotary), [qkv])


def test_float64():
    (q, k), (cos, sin) = make()
    q, k = q.double(), k.double()
    for a, b in zip(triton.rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_incoming_gradients_are_left_alone():
    (q, k), angles = make()
    q.requires_grad_()
    cotangents = [torch.ones_like(x) for x in (q, k)]
    torch.autograd.grad(triton.rotary(q, k, *angles), q, cotangents)
    for x in cotangents:
        assert torch.equal(x, torch.ones_like(x))


def test_angles_are_constants_and_dtypes_equal():
    (q, k), (cos, sin) = make()
    with pytest.raises(ValueError, match="cos or sin requires a gradient"):
        triton.rotary(q, k, cos.requires_grad_(), sin)
    with pytest.raises(ValueError, match=r"k has dtype torch.bfloat16: expected q's torch.float32"):
        triton.rotary(q, k.bfloat16(), cos.detach(), sin)


def test_the_second_derivative_is_right():
    """A second derivative is not refused, because a rotation is linear and its gradient is the same op."""
    (q, k), angles = make(L=2, D_head=4)

    def second(function):
        leaf = q.clone().requires_grad_()
        rotated, _ = function(leaf, k, *angles)
        (first,) = torch.autograd.grad(rotated.pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(second(triton.rotary), second(reference.rotary))


def test_torch_compile_traces_it():
    inputs, angles = make()
    inputs = [x.requires_grad_() for x in inputs]

    def loss(q, k):
        q, k = triton.rotary(q, k, *angles)
        return q.square().sum() + k.pow(3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_auto_takes_it_for_cuda_tensors_with_no_gpu():
    with FakeTensorMode(), kernels.backend("auto"):
        q, k = (torch.empty(2, 3, heads, 16, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        table = torch.empty(3, 8, device="cuda")
        q_out, k_out = kernels.rotary(q, k, table, table)
    assert (q_out.shape, k_out.shape, q_out.dtype) == (q.shape, k.shape, torch.bfloat16)
