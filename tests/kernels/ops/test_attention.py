from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels


def make(batch=2, length=7, heads=4, kv_heads=2, width=6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, h, width, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    ]


def naive(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Computes attention head by head and query by query."""
    out = torch.zeros_like(q)
    batch, length, heads, width = q.shape
    for b in range(batch):
        for h in range(heads):
            kv_head = h // (heads // k.shape[2])
            for i in range(length):
                visible = slice(i + 1 if causal else length)
                scores = (k[b, visible, kv_head] @ q[b, i, h]) / width**0.5
                out[b, i, h] = scores.softmax(0) @ v[b, visible, kv_head]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_naive_one(kv_heads, causal, backend):
    q, k, v = make(kv_heads=kv_heads)
    torch.testing.assert_close(kernels.attention(q, k, v, causal=causal), naive(q, k, v, causal=causal))


def test_differentiable_twice_and_forward():
    inputs = [x.requires_grad_() for x in make(length=4, heads=2, kv_heads=1, width=2)]
    with sdpa_kernel(SDPBackend.MATH), kernels.backend("reference"):
        assert torch.autograd.gradcheck(kernels.attention, inputs, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(kernels.attention, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, "q has shape .* expected four dimensions"),
        ({"k": torch.zeros(2)}, "k has shape .* expected four dimensions"),
        ({"v": torch.zeros(2, 3, 4, 8)}, r"v is \(2, 3, 4, 8\)"),
        ({"k": torch.zeros(2, 3, 2, 8, dtype=torch.bfloat16)}, "k is .* torch.bfloat16"),
        (
            {"k": torch.zeros(2, 3, 3, 8), "v": torch.zeros(2, 3, 3, 8)},
            "q has 4 heads and k has 3: expected a multiple",
        ),
    ],
)
def test_bad_input(change, message):
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 3, 4, 8),
        "k": torch.zeros(2, 3, 2, 8),
        "v": torch.zeros(2, 3, 2, 8),
    } | change
    with pytest.raises(ValueError, match=message):
        kernels.attention(**arguments)
