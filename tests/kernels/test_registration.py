"""Tests that ops of Python kernels compute and differentiate alike in a plain call and under a tracer."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kernels.registration import op


@op("test_scaled_sum")
def scaled_sum(tensors: list[Tensor], factor: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns factor · Σ tensors + bias, and the sum alone."""
    total = torch.stack([x.detach() for x in tensors]).sum(0)
    return factor * total + (0 if bias is None else bias.detach()), total.clone()


@scaled_sum.register_fake
def _(tensors: list[Tensor], factor: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tensors[0]), torch.empty_like(tensors[0])


@op("test_scaled")
def scaled(x: Tensor, factor: float) -> Tensor:
    return factor * x.detach()


@scaled.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx, inputs, output) -> None:
    tensors, ctx.factor, bias = inputs
    ctx.count, ctx.biased = len(tensors), bias is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, total_grad):
    tensor_grad = scaled(grad, ctx.factor)
    return [tensor_grad] * ctx.count, None, grad if ctx.biased else None


scaled_sum.register_autograd(_differentiate, _save)


def inputs() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second, bias = (torch.randn(3, generator=generator) for _ in range(3))
    return [first.requires_grad_(), second], bias.requires_grad_()


@pytest.mark.parametrize("call", [scaled_sum, scaled_sum._traced, torch.compile(scaled_sum, backend="aot_eager")])
def test_lists_and_missing_inputs(call) -> None:
    tensors, bias = inputs()
    output, total = call(tensors, 2.0, bias)
    torch.testing.assert_close(total, tensors[0] + tensors[1])
    torch.testing.assert_close(output, 2 * total + bias)
    gradients = torch.autograd.grad(output, [tensors[0], bias], torch.full((3,), 5.0))
    torch.testing.assert_close(gradients, (torch.full((3,), 10.0), torch.full((3,), 5.0)))
    torch.testing.assert_close(call([tensors[1]], 3.0, None)[0], 3 * tensors[1])


def test_a_plain_call_takes_no_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise AssertionError("through the custom op")

    tensors, bias = inputs()
    monkeypatch.setattr(scaled_sum, "_traced", refuse)
    monkeypatch.setattr(scaled, "_traced", refuse)
    scaled_sum(tensors, 2.0, torch.nn.Parameter(bias.detach()))[0].sum().backward()
    assert tensors[0].grad is not None
    with FakeTensorMode(), pytest.raises(AssertionError, match="through"):
        scaled_sum([torch.empty(3)], 2.0, None)


def test_an_op_without_a_derivative_refuses_backward() -> None:
    """The first derivative of `scaled` is refused, and so is the second of `scaled_sum`, whose backward it is."""
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="test_scaled's Triton backend is differentiable once"):
        scaled(x, 2.0).sum().backward()
    tensors, bias = inputs()
    cotangent = torch.ones(3, requires_grad=True)
    (first,) = torch.autograd.grad(scaled_sum(tensors, 2.0, bias)[0], tensors[0], cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()
