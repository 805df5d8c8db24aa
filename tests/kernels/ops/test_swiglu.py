import pytest
import torch

import kernels

pytestmark = pytest.mark.usefixtures("backend")


def make(dtype=torch.float64):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 3, 4, dtype=torch.float64).to(dtype)
    return gate, up


def test_definition():
    gate, up = make()
    torch.testing.assert_close(kernels.swiglu(gate, up), gate / (1 + (-gate).exp()) * up)


def test_bf16_is_rounded_once():
    gate, up = make(torch.bfloat16)
    assert torch.equal(kernels.swiglu(gate, up), kernels.swiglu(gate.double(), up.double()).bfloat16())


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_differentiable_twice_and_forward():
    inputs = [x.requires_grad_() for x in make()]
    assert torch.autograd.gradcheck(kernels.swiglu, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(kernels.swiglu, inputs)


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3), r"up is \(3,\)"),
        (torch.zeros(2), torch.zeros(2).bfloat16(), "up is .* torch.bfloat16"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), "gate has dtype torch.int64"),
    ],
)
def test_bad_input(gate, up, message):
    with pytest.raises(ValueError, match=message):
        kernels.swiglu(gate, up)
