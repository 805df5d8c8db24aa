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


def naive(q: Tensor, k: Tensor, v: Tensor, *, causal=True, segments: Tensor | None = None) -> Tensor:
    """Head by head, query by query."""
    out = torch.zeros_like(q)
    batch, length, heads, width = q.shape
    for b in range(batch):
        for h in range(heads):
            shared = h // (heads // k.shape[2])
            for i in range(length):
                if segments is not None and segments[b, i] < 0:
                    continue
                seen = [
                    j
                    for j in range(i + 1 if causal else length)
                    if segments is None or segments[b, j] == segments[b, i]
                ]
                score = (k[b, seen, shared] @ q[b, i, h]) / width**0.5
                out[b, i, h] = score.softmax(0) @ v[b, seen, shared]
    return out


SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [-1, 5, 5, 5, 5, 5, 2]])


@pytest.mark.parametrize("segments", [None, SEGMENTS, SEGMENTS.int()])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_naive_one(kv_heads, causal, segments, backend):
    q, k, v = make(kv_heads=kv_heads)
    got = kernels.attention(q, k, v, causal=causal, segments=segments)
    torch.testing.assert_close(got, naive(q, k, v, causal=causal, segments=segments))


def test_padding_is_zero_and_gives_no_gradient():
    q, k, v = (x.requires_grad_() for x in make())
    out = kernels.attention(q, k, v, segments=SEGMENTS)
    assert not out[SEGMENTS < 0].any()
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert gradient.isfinite().all()
        assert not gradient[SEGMENTS < 0].any()
    everything = torch.full_like(SEGMENTS, -1)
    assert not kernels.attention(q, k, v, segments=everything).any()


def test_dropout_drops_and_keeps_the_mean():
    q, k, v = (x.expand(200, -1, -1, -1) for x in make(batch=1))
    torch.manual_seed(0)
    dropped = kernels.attention(q, k, v, dropout=0.3)
    kept = kernels.attention(q, k, v)
    assert not torch.equal(dropped, kept)
    torch.testing.assert_close(dropped.mean(0), kept.mean(0), rtol=0.3, atol=0.3)


@pytest.mark.parametrize("segments", [None, SEGMENTS[:, :4]])
def test_differentiable_twice_and_forward(segments):
    inputs = [x.requires_grad_() for x in make(length=4, heads=2, kv_heads=1, width=2)]
    with sdpa_kernel(SDPBackend.MATH), kernels.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *x: kernels.attention(*x, segments=segments), inputs, check_forward_ad=True, fast_mode=True
        )
        assert torch.autograd.gradgradcheck(lambda *x: kernels.attention(*x, segments=segments), inputs, fast_mode=True)


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
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"segments": torch.zeros(2, 3)}, "segments is .* expected integers"),
        ({"segments": torch.zeros(2, 1, dtype=torch.int64)}, r"expected integers, \[B, L\] = \[2, 3\]"),
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
