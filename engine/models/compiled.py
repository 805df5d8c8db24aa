"""Bodies under torch.compile: fewer and larger kernels, and on a GPU less for its host to do between them.

B sequences, L positions, N rows to predict, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn


def compile_body(model: nn.Module, *, learns: bool) -> None:
    """Have the model's forward pass run compiled, as one graph, from the first time on, which then takes minutes.

    Whoever `learns` is compiled for that alone: evaluation, without gradients, has batches of many sizes.
    """
    # Within the module's call: hooks of an engine stay outside, where no tracer follows them.
    eager, compiled = model.forward, torch.compile(model.forward, fullgraph=True)

    def forward(tokens_BL: Tensor, rows_N: Tensor | None = None, *rest: Any) -> Tensor:
        if learns and not torch.is_grad_enabled():
            return eager(tokens_BL, rows_N, *rest)
        if rows_N is not None:  # so many in this batch, and in the next so many others
            torch._dynamo.maybe_mark_dynamic(rows_N, 0)  # pyright: ignore[reportAttributeAccessIssue]
        return compiled(tokens_BL, rows_N, *rest)

    model.forward = forward
