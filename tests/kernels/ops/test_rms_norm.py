import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import kernels

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers_bitwise(dtype):
    torch.manual_seed(0)
    x, theirs = torch.randn(2, 3, 16).to(dtype), LlamaRMSNorm(16, eps=1e-5)
    theirs.weight.data = torch.randn(16).to(dtype)
    assert torch.equal(kernels.rms_norm(x, theirs.weight, 1e-5), theirs(x))


def test_residual():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    normed, total = kernels.rms_norm(x, weight, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, kernels.rms_norm(x + residual, weight))


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_differentiable_twice_and_forward():
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (5,), (2, 5))]

    def both(x, weight, residual):
        return kernels.rms_norm(x, weight, residual=residual)

    assert torch.autograd.gradcheck(both, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\): expected \(4,\)"),
        ({"residual": torch.zeros(4)}, r"residual is \(4,\)"),
        ({"residual": torch.zeros(2, 4).bfloat16()}, "residual is .* torch.bfloat16: expected x's"),
        ({"eps": 0.0}, "eps is 0.0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.rms_norm(**({"x": torch.zeros(2, 4), "weight": torch.ones(4)} | change))
