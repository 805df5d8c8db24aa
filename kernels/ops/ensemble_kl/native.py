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
    logits_RNV: Sequence[Tensor], gradients_SNV: Sequence[Tensor | None], spec: LossSpec
) -> tuple[Tensor, Tensor | None]:
    """Computes `loss_and_grad` of `reference.py` in one pass. Gradients, of any dtype, are written where they are not
    None. Their rows may begin where those of the student's logits begin, if they take no more bytes.
    """
    ce_SN, kl_SRN = torch.ops.creche_native.ensemble_kl_loss_and_grad_(list(logits_RNV), list(gradients_SNV), *spec)
    return ce_SN, None if spec.kl_weight is None else kl_SRN
