"""The inner derivatives of the hypergradient by S² backward passes: slow, but nothing but autograd.

S students.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.data.batches import IGNORED, Step
from engine.students.coefficients import LossWeighting
from engine.students.hypergradient import FunctionalStudent, Parameters
from kernels import Projected, linear_ensemble_kl


def inner_derivatives(
    students: Sequence[FunctionalStudent],
    parameters: Sequence[Parameters],
    directions: Sequence[Parameters],
    step: Step,
    weighting: LossWeighting,
) -> Tensor:
    """Returns what `engine.students.hypergradient._inner_derivatives` does, from the S gradients of every student.

    Student i's weight counts by how the coefficients differ between ω = 0 and the unit vector of i.
    """
    S = len(students)
    zero_S, *units = torch.eye(S + 1, S + 1, dtype=torch.float64, device=weighting.device)[:, 1:]
    at_zero = weighting.coefficients(zero_S)
    inner_SS = torch.zeros(S, S, dtype=torch.float64, device=weighting.device)
    leaves = [{name: p.detach().requires_grad_() for name, p in named.items()} for named in parameters]
    for batch in step.micro_batches:
        streams = [Projected(*s.train().forward_with(named, batch)) for s, named in zip(students, leaves, strict=True)]
        for i in range(S):
            at_unit = weighting.coefficients(units[i])
            assert at_zero.kl_weight is not None
            assert at_unit.kl_weight is not None
            losses = linear_ensemble_kl(
                streams,
                [],
                batch.targets_N,
                ce_weight=at_unit.ce_weight - at_zero.ce_weight,
                kl_weight=at_unit.kl_weight - at_zero.kl_weight,
                normalizer=step.valid_tokens,
                temperature=at_zero.temperature,
                divergence=at_zero.divergence,
                ignore_index=IGNORED,
            ).losses
            for k in range(S):
                gradients = torch.autograd.grad(
                    losses[k], list(leaves[k].values()), retain_graph=i < S - 1, materialize_grads=True
                )
                for gradient, direction in zip(gradients, directions[k].values(), strict=True):
                    inner_SS[i, k] += torch.linalg.vecdot(gradient.flatten(), direction.flatten()).double()
    return inner_SS
