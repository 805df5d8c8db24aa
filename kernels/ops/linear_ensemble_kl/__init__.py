"""The losses of an ensemble from its hidden states and heads, without ever holding the logits of all tokens.

Shapes: N tokens, D hidden, V vocabulary, S students, K teachers, R = S + K streams.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.checks import check_options, check_targets
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.linear_ensemble_kl.precomputed_gradients import LossWithGradients


class Projected(NamedTuple):
    """A stream of logits hidden·weightᵀ + bias, not multiplied out. D may differ from stream to stream.

    hidden: [N, D], weight: [V, D], bias: [V] or None; floating point, of any dtype each.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class TopK(NamedTuple):
    """A teacher's predictions, as a cache keeps them: the most probable tokens, and the rest as one bucket.

    log_prob: [N, k] floating point, nats, at the loss's own temperature; index: [N, k] integers, the tokens, different
    within a row; tail: [N] floating point, the probability of all others, so that Σ exp(log_prob) + tail = 1.
    """

    log_prob: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    tail: Tensor


class LinearEnsembleKL(NamedTuple):
    """The students' losses, to call backward on, and what they are made of, detached.

    losses: S scalars, fp32 (float64 where a student is). Each has an autograd graph of its own.
    ce: [S, N], per token in nats, at temperature 1.
    kl: [S, R, N], per token in nats, of the tempered distributions, without T²; None if no divergence was asked for.
    """

    losses: tuple[Tensor, ...]
    ce: Tensor
    kl: Tensor | None


def linear_ensemble_kl(
    students: Sequence[Projected],
    teachers: Sequence[Projected | TopK],
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
    """Student i's loss against the targets and all other streams, and the gradients of its hidden states and head:

        loss_i = Σ_n [ce_weight[i]·CE_i,n + T²·Σ_{j≠i} kl_weight[i, j]·KL_ij,n] / normalizer

    with CE and KL of `kernels.ensemble_kl`, peers and teachers constant. One formula for plain training (no kl_weight),
    for distillation (Timiryasov & Tastet 2023: α·CE + (1−α)·T²·KL; Hinton et al. 2015 for T²), for mutual learning
    (Zhang et al. 2018, eq. 5-7: weights 1/(S−1)) and for weighted mutual learning (Iyer 2024).

    Tokens are taken in chunks, so that N × V never exists. The gradients are computed here, without a graph; each loss
    then carries an autograd node of its own, whose backward hands that student's gradients back, times the incoming
    one. So backward of loss i touches student i alone. The gradients are freed once handed back, so a second backward
    of the same loss raises; so does a request for second derivatives (`create_graph`), which the node does not have.
    Nothing waits for the device. Logits are fp32 whatever the storage (float64 stays float64), also under autocast;
    gradients are summed in fp32 and rounded once, after the incoming gradient (a loss scale) has been applied.

    Args:
        students: S ≥ 1 streams. Gradients are computed only for tensors that require them while grad mode is on.
        teachers: K = R − S streams, R ≤ 8; not evaluated if kl_weight is None. The divergence from a `TopK` is that of
            k + 1 buckets, its tail one of them and the student's tail 1 − Σ of its own k (`top_k.py`).
        targets: [N] int64 token ids in [0, V), or `ignore_index`: no CE in such a row.
        ce_weight: [S], without gradient, on the students' device.
        kl_weight: [S, R], as ce_weight; None: no KL at all. The diagonal is not read.
        normalizer: the step's count of valid tokens over all ranks and micro-batches, ≥ 1; an int or a 0-d tensor
            (whose range is checked on the CPU only). The rows given here may all be ignored: the losses are then 0.
        temperature: T > 0, of the divergences.
        divergence: "forward", "reverse" or "jsd".
        kl_mask: [N] bool, the rows in which KL counts; None: those in which CE does.
        ignore_index: the target that marks a row as ignored.

    Returns:
        LinearEnsembleKL(losses, ce, kl).

    Raises:
        ValueError: any of the above not met.
    """
    _check_streams(students, teachers)
    check_options(len(students), len(students) + len(teachers), temperature, divergence)
    first = students[0]
    tokens, vocabulary = len(first.hidden), len(first.weight)
    check_targets(targets, tokens, vocabulary, ignore_index)
    _check_weights(ce_weight, kl_weight, len(students), len(students) + len(teachers), first.hidden.device)
    if kl_mask is not None and (kl_mask.shape != (tokens,) or kl_mask.dtype != torch.bool):
        raise ValueError(f"kl_mask is {tuple(kl_mask.shape)} {kl_mask.dtype}: expected bool [N] = [{tokens}]")
    _check_normalizer(normalizer)

    needs = [[_needs_gradient(x) for x in student] for student in students]
    ce_rows = targets != ignore_index
    kl_rows = ce_rows if kl_mask is None else kl_mask
    spec = LossSpec(targets, ce_weight, kl_weight, ce_rows, kl_rows, temperature, divergence)
    run = dispatch.implementation("linear_ensemble_kl", first.hidden).losses_and_gradients
    with torch.no_grad(), torch.autocast(first.hidden.device.type, enabled=False):
        taught = teachers if kl_weight is not None else ()
        losses, ce, kl, gradients = run(students, taught, spec, normalizer, needs)
    losses = [
        LossWithGradients.apply(loss, own, *student) if any(g is not None for g in own) else loss
        for loss, own, student in zip(losses, gradients, students, strict=True)
    ]
    return LinearEnsembleKL(tuple(losses), ce, kl)


def _needs_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _check_streams(students: Sequence[Projected], teachers: Sequence[Projected | TopK]) -> None:
    if not students:
        raise ValueError("students is empty: expected at least one Projected(hidden, weight, bias)")
    first = students[0]
    names = [f"student {i}" for i in range(len(students))] + [f"teacher {k}" for k in range(len(teachers))]
    for name, stream in zip(names, (*students, *teachers), strict=True):
        if isinstance(stream, TopK):
            _check_top_k(name, stream, len(first.hidden), first.hidden.device)
            continue
        hidden, weight, bias = stream
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(f"{name} has {shapes}: expected [N, D] and [V, D]; flatten the tokens, gather the head")
        if len(hidden) != len(first.hidden) or len(weight) != len(first.weight):
            raise ValueError(
                f"{name} has {shapes}: expected N = {len(first.hidden)} and V = {len(first.weight)}, as student 0;"
                " streams must share tokens and vocabulary"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} has bias {tuple(bias.shape)}: expected [V] = [{len(weight)}] or None")
        for x in (hidden, weight, bias):
            if x is not None and (not x.is_floating_point() or x.device != first.hidden.device):
                raise ValueError(
                    f"{name} has a tensor of {x.dtype} on {x.device}: expected floating point on"
                    f" {first.hidden.device}, as student 0's hidden states"
                )


def _check_top_k(name: str, top: TopK, tokens: int, device: torch.device) -> None:
    shapes = f"log_prob {tuple(top.log_prob.shape)}, index {tuple(top.index.shape)}, tail {tuple(top.tail.shape)}"
    if top.log_prob.ndim != 2 or top.log_prob.shape != top.index.shape or top.tail.shape != (len(top.index),):
        raise ValueError(f"{name} has {shapes}: expected [N, k], [N, k] and [N]")
    if len(top.index) != tokens:
        raise ValueError(f"{name} has {shapes}: expected N = {tokens}, as student 0; streams must share tokens")
    kinds = top.log_prob.is_floating_point() and top.tail.is_floating_point() and not top.index.is_floating_point()
    if not kinds or any(x.device != device for x in top):
        raise ValueError(f"{name}: expected floating point log_prob and tail, integers in index, all on {device}")


def _check_weights(ce: Tensor, kl: Tensor | None, students: int, streams: int, device: torch.device) -> None:
    for name, weight, shape in (("ce_weight", ce, (students,)), ("kl_weight", kl, (students, streams))):
        if weight is None:
            continue
        if weight.shape != shape or not weight.is_floating_point() or weight.device != device:
            raise ValueError(
                f"{name} is {tuple(weight.shape)} {weight.dtype} on {weight.device}: expected floating point {shape}"
                f" on {device}"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which this op does not give: pass {name}.detach()")


def _check_normalizer(normalizer: int | Tensor) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: expected an int or a 0-d tensor")
        if normalizer.device.type != "cpu":
            return
    if not normalizer >= 1:
        raise ValueError(
            f"normalizer is {normalizer}: expected the step's count of valid tokens, at least 1;"
            " skip a step that has none"
        )
