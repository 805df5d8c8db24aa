import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kernels

pytestmark = pytest.mark.usefixtures("backend")


def make(dtype=torch.float64):
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 4, 6, dtype=torch.float64), torch.randn(2, 5, 2, 6, dtype=torch.float64)
    angle = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)
    return q.to(dtype), k.to(dtype), angle.cos().float(), angle.sin().float()


def test_equals_transformers():
    q, k, cos, sin = make()
    full_cos, full_sin = (torch.cat((x, x), -1).double()[None] for x in (cos, sin))
    theirs = apply_rotary_pos_emb(q, k, full_cos, full_sin, unsqueeze_dim=2)
    for actual, want in zip(kernels.rotary(q, k, cos, sin), theirs, strict=True):
        torch.testing.assert_close(actual, want)


def test_bf16_is_rounded_once():
    q, k, cos, sin = make(torch.bfloat16)
    wide = kernels.rotary(q.double(), k.double(), cos, sin)
    for actual, want in zip(kernels.rotary(q, k, cos, sin), wide, strict=True):
        assert torch.equal(actual, want.bfloat16())


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_differentiable_twice_and_forward():
    q, k, cos, sin = make()
    inputs = [q[:1, :2].requires_grad_(), k[:1, :2].requires_grad_()]
    assert torch.autograd.gradcheck(lambda q, k: kernels.rotary(q, k, cos[:2], sin[:2]), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda q, k: kernels.rotary(q, k, cos[:2], sin[:2]), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 4, 5)}, "an even D_head"),
        ({"k": torch.zeros(2, 4, 2, 6)}, r"k has shape \(2, 4, 2, 6\)"),
        ({"cos": torch.zeros(5, 6)}, r"cos has shape \(5, 6\): expected \[L, D_head / 2\] = \(5, 3\)"),
        ({"sin": torch.zeros(9, 3)}, r"sin has shape \(9, 3\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.rotary(**(dict(zip(("q", "k", "cos", "sin"), make(), strict=True)) | change))
