"""Bodies under torch.compile: fewer and larger kernels, and on a GPU less for its host to do between them.

B sequences, L positions, N rows to predict, D hidden, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from engine.models.llama import rotary_table

GRAPHS = 2  # of a body at most: its first batch's, and where batches differ, one for all


def compile_body(model: nn.Module, *, learns: bool) -> None:
    """Have the model's forward pass run compiled, as one graph, from the first time on, which then takes minutes.

    Whoever `learns` is compiled for that alone: evaluation, without gradients, has batches of many sizes.
    """
    for module in model.modules() if learns else ():
        if isinstance(module, nn.Embedding):
            module.forward = partial(_lookup, module.weight)
    torch.compiler.assume_constant_result(rotary_table)  # traced, it would be made anew in every pass
    # The limit is of a function's graphs, and bodies of one family share their function.
    torch._dynamo.config.recompile_limit += GRAPHS  # pyright: ignore[reportAttributeAccessIssue]
    # Within the module's call: hooks of an engine stay outside, where no tracer follows them.
    eager, compiled = model.forward, torch.compile(model.forward, fullgraph=True)

    def forward(tokens_BL: Tensor, rows_N: Tensor | None = None, *rest: Any) -> Tensor:
        if learns and not torch.is_grad_enabled():
            return eager(tokens_BL, rows_N, *rest)
        if rows_N is not None:  # so many in this batch, and in the next so many others
            torch._dynamo.maybe_mark_dynamic(rows_N, 0)  # pyright: ignore[reportAttributeAccessIssue]
        return compiled(tokens_BL, rows_N, *rest)

    model.forward = forward


# An embedding's gradient adds rows of equal tokens up. The compiler's does so in any order; torch's own, which it does
# not look into here, in one.


@library.custom_op("creche::embedding", mutates_args=())
def _lookup(weight_VD: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, weight_VD)


@library.custom_op("creche::embedding_backward", mutates_args=())
def _lookup_backward(gradient: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(gradient, tokens, vocab_size, -1, False)


@_lookup.register_fake
def _(weight_VD: Tensor, tokens: Tensor) -> Tensor:
    return weight_VD.new_empty(*tokens.shape, weight_VD.shape[1])


@_lookup_backward.register_fake
def _(gradient: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    return gradient.new_empty(vocab_size, gradient.shape[-1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    weight_VD, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab_size = len(weight_VD)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _lookup_backward(gradient, *ctx.saved_tensors, ctx.vocab_size), None


_lookup.register_autograd(_differentiate, setup_context=_save)
