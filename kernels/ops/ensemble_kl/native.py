"""`ensemble_kl` on a CPU, by `native.cpp`.

Shapes: N tokens, V vocabulary, S students, R streams.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.ensemble_kl.loss_spec import LossSpec


def ensemble_kl(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ensemble_kl`. It is differentiable once, by one node for all students, whose backward pass reads the
    logits again.
    """
    return torch.ops.creche_native.ensemble_kl(list(streams), targets, students, temperature, divergence, ignore_index)


def loss_and_grad_(
    logits_RNV: Sequence[Tensor], spec: LossSpec, wanted: Sequence[bool], into: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Computes `loss_and_grad` of `reference.py` in one pass. Gradients replace the logits of the `wanted` students.

    Args:
        into: For each student, the [N, V] tensor of any dtype that receives its gradient instead. Its rows may begin
            where those of its logits begin, if they take no more bytes.
    """
    gradients = [x if want else None for x, want in zip(into or logits_RNV, wanted, strict=False)]
    ce_SN, kl_SRN = torch.ops.creche_native.ensemble_kl_loss_and_grad_(list(logits_RNV), gradients, *spec)
    return ce_SN, None if spec.kl_weight is None else kl_SRN
