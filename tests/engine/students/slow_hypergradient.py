"""The inner derivatives of the hypergradient by S² backward passes: slow, but nothing but autograd.

S students.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.data.batches import IGNORED, Step
from engine.students.hypergradient import CoefficientDerivatives, FunctionalStudent, Parameters
from kernels import Projected, linear_ensemble_kl


def inner_derivatives(
    students: Sequence[FunctionalStudent],
    parameters: Sequence[Parameters],
    directions: Sequence[Parameters],
    step: Step,
    derivatives: CoefficientDerivatives,
) -> Tensor:
    """Returns what `engine.students.hypergradient._inner_derivatives` does, from the S gradients of every student."""
    S = len(students)
    inner_SS = torch.zeros(S, S, dtype=torch.float64, device=derivatives.ce.device)
    leaves = [{name: p.detach().requires_grad_() for name, p in named.items()} for named in parameters]
    for batch in step.micro_batches:
        streams = [Projected(*s.train().at(named, batch)) for s, named in zip(students, leaves, strict=True)]
        for i in range(S):
            losses = linear_ensemble_kl(
                streams,
                [],
                batch.targets_N,
                ce_weight=derivatives.ce[i],
                kl_weight=derivatives.kl[i],
                normalizer=step.valid_tokens,
                temperature=derivatives.temperature,
                divergence=derivatives.divergence,
                ignore_index=IGNORED,
            ).losses
            for k in range(S):
                gradients = torch.autograd.grad(
                    losses[k], list(leaves[k].values()), retain_graph=i < S - 1, materialize_grads=True
                )
                for gradient, direction in zip(gradients, directions[k].values(), strict=True):
                    inner_SS[i, k] += torch.linalg.vecdot(gradient.flatten(), direction.flatten()).double()
    return inner_SS
