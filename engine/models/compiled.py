"""Models whose forward pass runs under torch.compile: fewer and larger kernels, and less work for a GPU's host.

B sequences, L positions, N rows to predict, D hidden, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from engine.models.llama import rotary_table
from engine.system.private_api import mark_size_as_changing

GRAPHS = 2  # per model, at most: one for the first length of a sequence, and one for all others


def compile_body(model: nn.Module, *, learns: bool) -> None:
    """Has the model's forward pass run compiled, as one graph; its first call then takes minutes.

    A model that `learns` runs compiled in training only, because batches of evaluation have many sizes.
    """
    for module in model.modules() if learns else ():
        if isinstance(module, nn.Embedding):
            module.forward = partial(_embedding, module.weight)
    torch.compiler.assume_constant_result(rotary_table)  # Traced, it would be computed again in every pass.
    # The limit counts the graphs of one function, and all models of a family share their function.
    torch.compiler.config.recompile_limit += GRAPHS
    # The forward pass is replaced and not the module, so that an engine's hooks, which cannot be traced, stay outside.
    eager, compiled = model.forward, torch.compile(model.forward, fullgraph=True)

    def forward(tokens_BL: Tensor, rows_N: Tensor | None = None, *rest: Any) -> Tensor:
        if learns and not torch.is_grad_enabled():
            return eager(tokens_BL, rows_N, *rest)
        if rows_N is not None:
            mark_size_as_changing(rows_N, 0)  # Every batch has another number of rows.
        return compiled(tokens_BL, rows_N, *rest)

    model.forward = forward


# The gradient of an embedding sums the rows of equal tokens. The compiler's code would sum them in any order; torch's
# own operator, which these definitions hide from the compiler, always sums them in one order.


@library.custom_op("creche::embedding", mutates_args=())
def _embedding(weight_VD: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, weight_VD)


@library.custom_op("creche::embedding_backward", mutates_args=())
def _embedding_backward(gradient: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(gradient, tokens, vocab_size, -1, False)


@_embedding.register_fake
def _(weight_VD: Tensor, tokens: Tensor) -> Tensor:
    return weight_VD.new_empty(*tokens.shape, weight_VD.shape[1])


@_embedding_backward.register_fake
def _(gradient: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    return gradient.new_empty(vocab_size, gradient.shape[-1])


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    weight_VD, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab_size = len(weight_VD)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _embedding_backward(gradient, *ctx.saved_tensors, ctx.vocab_size), None


_embedding.register_autograd(_differentiate, setup_context=_save_for_backward)
