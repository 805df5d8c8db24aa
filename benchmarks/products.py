"""The matrix products of a step alone, at their own shapes: a step cannot take less time than they do.

B sequences, L positions, N = B·L tokens, D hidden, H heads, V vocabulary, F inner width of the MLP.
"""

import torch
from torch import Tensor

from engine.models.base import Shape
from engine.models.llama import LlamaShape

Product = tuple[Tensor, Tensor, Tensor]  # left [(b,) m, k], right [(b,) k, n], out [(b,) m, n]


def step_products(
    shape: Shape,
    batch: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    backward: bool = True,
) -> list[Product]:
    """Returns the matrix products of one student's step in their order, or without `backward` those of a teacher's.

    A linear layer, and so the head, has three: the output, the gradient of the input and that of the weight. Attention
    has the scores and the mix of the values, and four products for their gradients; they are whole squares, since a
    single product cannot be a triangle. Each weight and its gradient has memory of its own. Activations of equal shape
    share theirs, as a step finds what it has just written in the cache. All output tensors exist already.
    """
    if not isinstance(shape, LlamaShape):
        raise ValueError(f"{shape}: only the products of LLaMAs are known")
    tokens, width = batch * length, shape.head_width
    buffers: dict[tuple[str, int], Tensor] = {}

    def activation(kind: str, columns: int) -> Tensor:
        if (kind, columns) not in buffers:
            buffers[kind, columns] = torch.randn(tokens, columns, device=device, dtype=dtype)
        return buffers[kind, columns]

    def linear(inputs: int, outputs: int) -> tuple[list[Product], list[Product]]:
        weight, d_weight = torch.randn(2, outputs, inputs, device=device, dtype=dtype)
        x, y = activation("value", inputs), activation("result", outputs)
        dx, dy = activation("d_result", inputs), activation("d_value", outputs)
        return [(x, weight.T, y)], [(dy, weight, dx), (dy.T, x, d_weight)]

    def attention() -> tuple[list[Product], list[Product]]:
        heads = batch * shape.heads
        q, k, v, mixed, dq, dk, dv, d_mixed = torch.randn(8, heads, length, width, device=device, dtype=dtype)
        scores, p, dp, d_scores = torch.randn(4, heads, length, length, device=device, dtype=dtype)
        forward = [(q, k.mT, scores), (p, v, mixed)]
        return forward, [(p.mT, d_mixed, dv), (d_mixed, v.mT, dp), (d_scores, k, dq), (d_scores.mT, q, dk)]

    hidden, kv_hidden = shape.hidden, shape.kv_heads * width
    parts = []
    for _ in range(shape.layers):
        parts += [linear(hidden, hidden), linear(hidden, kv_hidden), linear(hidden, kv_hidden), attention()]
        parts += [linear(hidden, hidden), linear(hidden, shape.ffn), linear(hidden, shape.ffn)]
        parts += [linear(shape.ffn, hidden)]
    parts.append(linear(hidden, shape.vocab_size))
    forward = [product for part, _ in parts for product in part]
    return forward + [product for _, part in reversed(parts) for product in part if backward]
