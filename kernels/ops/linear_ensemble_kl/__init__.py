"""The losses of an ensemble from its hidden states and heads, without the logits of all tokens in memory at once.

Shapes: N tokens, D hidden, V vocabulary, S students, K teachers, R = S + K streams.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import check_options, check_targets
from kernels.ops.ensemble_kl.loss_spec import LossSpec


class Projected(NamedTuple):
    """Hidden states and a head, which stand for the logits hidden·weightᵀ + bias. D may differ between streams.

    hidden: [N, D], weight: [V, D], bias: [V] or None. Each is of any floating-point dtype.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class LinearEnsembleKL(NamedTuple):
    """The students' losses, to call backward on, and their detached parts.

    losses: S scalars, fp32 (float64 where a student is). Each has an autograd graph of its own.
    ce: [S, N], per token in nats, at temperature 1.
    kl: [S, R, N], per token in nats, of the tempered distributions, without T². None without `kl_weight`.
    """

    losses: tuple[Tensor, ...]
    ce: Tensor
    kl: Tensor | None


def linear_ensemble_kl(
    students: Sequence[Projected],
    teachers: Sequence[Projected],
    targets: Tensor,
    *,
    ce_weight: Tensor,
    kl_weight: Tensor | None,
    normalizer: int | Tensor,
    temperature: float = 1.0,
    divergence: str = "forward",
    kl_mask: Tensor | None = None,
    ignore_index: int = -100,
) -> LinearEnsembleKL:
    """Computes student i's loss against the targets and all other streams, and the gradients of its hidden states and
    head:

        loss_i = Σ_n [ce_weight[i]·CE_i,n + T²·Σ_{j≠i} kl_weight[i, j]·KL_ij,n] / normalizer

    where CE and KL are those of `kernels.ensemble_kl`, and peers and teachers are constants. This one formula gives
    plain training (no kl_weight), distillation (Timiryasov & Tastet 2023: α·CE + (1−α)·T²·KL; T² is from Hinton et al.
    2015), mutual learning (Zhang et al. 2018, eq. 5-7: weights 1/(S−1)) and weighted mutual learning (Iyer 2024).

    Tokens are taken in chunks, so that N × V logits never exist at once. The gradients are computed here, without a
    graph. The backward pass of loss i, which touches student i alone, multiplies them by the incoming gradient and
    frees them. A second one of the same loss raises, and so does a request for second derivatives (`create_graph`).
    Nothing waits for the device. Logits are fp32 whatever the storage (float64 stays float64), also under autocast.
    Gradients are summed in fp32 and rounded once, after the incoming gradient (a loss scale) has been applied.

    Args:
        students: S ≥ 1 streams. Gradients are computed only for tensors that require them while grad mode is on.
        teachers: K = R − S streams, R ≤ 8. They are not evaluated if kl_weight is None.
        targets: [N] int64 token ids in [0, V), or `ignore_index` for rows without CE.
        ce_weight: [S], without gradient, on the students' device.
        kl_weight: [S, R], like ce_weight. Its diagonal is not read. None: no KL is computed.
        normalizer: The step's count of valid tokens over all ranks and micro-batches, ≥ 1: an int or a 0-d tensor,
            whose value is checked on the CPU only. If all rows given here are ignored, the losses are 0.
        kl_mask: [N] bool, the rows in which KL counts. None: the rows in which CE counts.
        temperature, divergence, ignore_index: As in `kernels.ensemble_kl`.

    Raises:
        ValueError: An argument is not as described.
    """
    _check_streams(students, teachers)
    check_options(len(students), len(students) + len(teachers), temperature, divergence)
    first = students[0]
    tokens, vocab_size = len(first.hidden), len(first.weight)
    check_targets(targets, tokens, vocab_size, ignore_index)
    _check_weight("ce_weight", ce_weight, (len(students),), first.hidden.device)
    if kl_weight is not None:
        _check_weight("kl_weight", kl_weight, (len(students), len(students) + len(teachers)), first.hidden.device)
    if kl_mask is not None and (kl_mask.shape != (tokens,) or kl_mask.dtype != torch.bool):
        raise ValueError(
            f"kl_mask is {tuple(kl_mask.shape)} {kl_mask.dtype}: expected bool [N] = [{tokens}]; flatten it"
        )
    _check_normalizer(normalizer)

    grad_mode = torch.is_grad_enabled()
    needs = [[grad_mode and x is not None and x.requires_grad for x in student] for student in students]
    ce_rows = targets != ignore_index
    kl_rows = ce_rows if kl_mask is None else kl_mask
    spec = LossSpec(targets, ce_weight, kl_weight, ce_rows, kl_rows, temperature, divergence)
    backend = dispatch.implementation("linear_ensemble_kl", first.hidden)
    with torch.no_grad(), torch.autocast(first.hidden.device.type, enabled=False):
        used_teachers = teachers if kl_weight is not None else ()
        losses, ce, kl, gradients = backend.losses_and_gradients(students, used_teachers, spec, normalizer, needs)
    losses = [
        _LossWithGradients.apply(loss, grads, *student) if any(g is not None for g in grads) else loss
        for loss, grads, student in zip(losses, gradients, students, strict=True)
    ]
    return LinearEnsembleKL(tuple(losses), ce, kl)


class _LossWithGradients(torch.autograd.Function):
    """A loss whose gradients are known. Backward returns them times the incoming gradient, once, and frees them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        """Returns the loss. gradients[k] is d loss / d inputs[k], in the dtype it was summed in; None if unwanted."""
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would drop second-order terms silently where the incoming gradient is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_ensemble_kl is differentiable once: run its backward without create_graph, or build the loss"
                " from ensemble_kl with the reference backend, which is differentiable twice"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was already called on this loss of linear_ensemble_kl, which then freed its gradients: sum"
                " everything that depends on the loss into one backward, or call linear_ensemble_kl again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        (output_gradient,) = output_gradients
        # Some gradients are transposed. The pass that casts them also makes them contiguous for all later readers.
        input_gradients = (
            None if x is None else x.mul_(output_gradient).to(dtype, memory_format=torch.contiguous_format)
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, None, *input_gradients


def _check_streams(students: Sequence[Projected], teachers: Sequence[Projected]) -> None:
    if not students:
        raise ValueError("students is empty: expected at least one; pass [Projected(hidden, weight, bias)]")
    first = students[0]
    names = [f"student {i}" for i in range(len(students))] + [f"teacher {k}" for k in range(len(teachers))]
    for name, stream in zip(names, (*students, *teachers), strict=True):
        hidden, weight, bias = stream
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name} has {shapes}: expected [N, D] and [V, D]; pass hidden as [N, D], and gather a sharded head"
            )
        if len(hidden) != len(first.hidden) or len(weight) != len(first.weight):
            raise ValueError(
                f"{name} has {shapes}: expected N = {len(first.hidden)} and V = {len(first.weight)}, as student 0 has;"
                " pass streams of the same tokens and vocabulary"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{name} has bias {tuple(bias.shape)}: expected [V] = [{len(weight)}]; pass None without one"
            )
        for x in (hidden, weight, bias):
            if x is not None and (not x.is_floating_point() or x.device != first.hidden.device):
                raise ValueError(
                    f"{name} has a tensor of {x.dtype} on {x.device}: expected floating point on"
                    f" {first.hidden.device}, where student 0's hidden states are; cast or move it"
                )


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if weight.shape != shape or not weight.is_floating_point() or weight.device != device:
        raise ValueError(
            f"{name} is {tuple(weight.shape)} {weight.dtype} on {weight.device}: expected floating point {shape}"
            f" on {device}; reshape, cast or move it"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient: expected a constant; pass {name}.detach()")


def _check_normalizer(normalizer: int | Tensor) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: expected an int or a 0-d tensor; sum it")
        if normalizer.device.type != "cpu":
            return
    if not normalizer >= 1:
        raise ValueError(
            f"normalizer is {normalizer}: expected the step's count of valid tokens, at least 1;"
            " skip a step that has none"
        )
