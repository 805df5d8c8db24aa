"""`ensemble_kl` on a GPU: how `triton_kernel.py` is launched, for losses and then gradients, or for both at once.

Shapes: N tokens, V vocabulary, S students, K teachers, R = S + K streams.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import launch
from kernels.ops.ensemble_kl.triton_kernel import ensemble_kl_kernel
from kernels.registration import op


def arguments(
    logits: Sequence[Tensor],
    *,
    students: int,
    targets: Tensor | None,
    ce_rows: Tensor | None,
    kl_rows: Tensor | None,
    losses: tuple[Tensor, Tensor | None] | None = None,
    saved: tuple[Tensor, Tensor | None] | None = None,
    gradients: Sequence[Tensor | None] | None = None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    kl_scale: float = 1.0,
    vocabulary: int | None = None,
    temperature: float,
    divergence: str,
    lanes: int,
    paired: bool = False,
) -> tuple[list[Any], dict[str, Any]]:
    """What `ensemble_kl_kernel` is called with: its arguments in order, and its constants and launch options.

    Args:
        logits: R tensors [N, W]. students: S. targets, ce_rows, kl_rows, kl_scale: as in the kernel.
        losses: (ce [S, N], kl [S, R, N] or None) to be written; None: gradients alone.
        saved: (statistics, mean_ratios), to be written with losses, to be read without.
        gradients: S tensors [N, W] or None; None: losses alone.
        weights: d/d ce [S, N] and d/d kl [S, R, N], expanded as they may be; a kl weight of None leaves streams apart.
        vocabulary: V; None: W.
        lanes, paired: as in `launch.ensemble_kl`.
    """
    (tokens, width), streams = logits[0].shape, len(logits)
    ce_weight, kl_weight = weights
    if losses is not None and losses[1] is None:
        temperature = 1.0  # as there is nothing to temper
    sizes = [x.element_size() for x in logits]
    tile = launch.ensemble_kl(
        width, students, streams, min(sizes), lanes, divergence=divergence, mixed=len({*sizes}) > 1, paired=paired
    )
    vector = 16 // min(sizes)
    written = [] if gradients is None else [g for g in gradients if g is not None]
    constants = {
        "S": students,
        "DIVERGENCE": divergence,
        "TEMPERED": temperature != 1,
        "UNIT": all(x.stride(1) == 1 for x in (*logits, *written)),
        "BLOCKS": tile.block // (lanes * tile.warps * vector) if tile.block >= width else 0,
        "PARTS": tile.parts,
        "SWEEPS": tile.sweeps,
        "LANES": lanes * tile.warps,
        "VEC": vector,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    ce, kl = losses or (None, None)
    statistics, mean_ratios = saved or (None, None)
    return [
        tuple(logits),
        _strides(logits),
        None if gradients is None else tuple(gradients),
        None if gradients is None else _strides([logits[0] if g is None else g for g in gradients]),
        targets,
        ce_rows,
        kl_rows,
        ce,
        kl,
        statistics,
        mean_ratios,
        ce_weight,
        None if ce_weight is None else ce_weight.stride(),
        kl_weight,
        None if kl_weight is None else kl_weight.stride(),
        kl_scale,
        tokens,
        None if vocabulary == width else vocabulary,
        width,
        temperature,
    ], constants


def _strides(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride())


@functools.cache
def _gpu(device: torch.device) -> dict[str, Any]:
    """What `launch` wants to know of a device."""
    if device.type != "cuda":
        return {"lanes": 32}
    found = torch.cuda.get_device_properties(device)
    return {"lanes": found.warp_size, "paired": torch.version.hip is None and found.major >= 10}


def _launch(logits: Sequence[Tensor], **options: Any) -> None:
    """`arguments` to the kernel, a program per token."""
    if not len(logits[0]):
        return
    positional, constants = arguments(logits, **_gpu(logits[0].device), **options)
    with torch.cuda.device_of(logits[0]):
        ensemble_kl_kernel[(len(logits[0]),)](*positional, **constants)


def loss_and_grad(
    logits: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    targets: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor | None,
    ce_rows: Tensor,
    kl_rows: Tensor,
    *,
    vocabulary: int,
    temperature: float,
    divergence: str,
) -> tuple[Tensor, Tensor | None]:
    """Per-token losses, and the gradient of every student's weighted sum of them, in one launch (two if S > 4).

    The sum is that of `reference.loss_and_grad`: Σ_n [ce_weight[i]·CE_i,n + T²·Σ_j kl_weight[i, j]·KL_ij,n].

    Args:
        logits: R tensors [N, W] of fp32, bf16 or fp16, W >= V; columns from V on are padding and may hold anything.
        gradients: S tensors [N, W] of any of these dtypes to be written, or None where not wanted; the students' logits
            themselves are allowed.
        targets: [N] int64; rows outside `ce_rows` may hold anything.
        ce_weight: [S]. kl_weight: [S, R], or None: no divergence is computed, and teachers' logits are not read.
        ce_rows, kl_rows: [N] bool, the rows that count; the others are 0 in losses and gradients.
        vocabulary: V.

    Returns:
        ce [S, N], kl [S, R, N] (None without `kl_weight`) in nats, unweighted, fp32.
    """
    S, N = len(gradients), len(targets)
    ce, kl, *saved = _allocate(logits, S, divergence)
    pairs = kl_weight is not None and len(logits) > 1
    if not pairs:
        logits, kl = logits[:S], kl.zero_()
    options: dict[str, Any] = {
        "students": S,
        "targets": targets,
        "ce_rows": ce_rows,
        "kl_rows": kl_rows if pairs else None,
        "kl_scale": temperature**2,
        "vocabulary": vocabulary,
        "temperature": temperature,
        "divergence": divergence,
    }
    losses = ce, kl if pairs else None
    made: dict[str, Any] = {
        "gradients": gradients if any(g is not None for g in gradients) else None,
        "weights": (
            ce_weight[:, None].expand(S, N),
            kl_weight[:, :, None].expand(S, -1, N) if pairs and kl_weight is not None else None,
        ),
    }
    if pairs and S > launch.STUDENTS_AT_ONCE:
        _launch(logits, losses=losses, saved=saved, **options)
        if made["gradients"] is not None:
            _launch(logits, saved=saved, **made, **options)
    else:
        _launch(logits, losses=losses, **made, **options)
    return ce, None if kl_weight is None else kl


def ensemble_kl(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ensemble_kl`. Differentiable once.

    Raises:
        ValueError: a stream of float64.
    """
    for r, logits in enumerate(streams):
        if logits.dtype == torch.float64:
            raise ValueError(
                f"stream {r} is {logits.dtype}: the Triton kernel computes in fp32; convert it, or choose"
                " kernels.backend('reference')"
            )
    ce, kl, _, _ = _forward(list(streams), targets, students, float(temperature), divergence, ignore_index)
    return ce, kl


@op("ensemble_kl")
def _forward(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ce, kl, and what the backward wants from the kernel: statistics, mean_ratios."""
    outputs = ce, kl, statistics, mean_ratios = _allocate(streams, students, divergence)
    pairs = len(streams) > 1
    if targets is None:
        ce.zero_()
    if not pairs:
        kl.zero_()
    if pairs or targets is not None:
        rows = None if targets is None else targets != ignore_index
        _launch(
            streams,
            students=students,
            targets=None if targets is None else targets.contiguous(),
            ce_rows=rows,
            kl_rows=rows,
            losses=(ce, kl if pairs else None),
            saved=(statistics, mean_ratios),
            temperature=temperature,
            divergence=divergence,
        )
    return outputs


def _allocate(streams: Sequence[Tensor], students: int, divergence: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S, R, N = students, len(streams), len(streams[0])
    ce = streams[0].new_empty(S, N, dtype=torch.float32)
    return (
        ce,
        ce.new_empty(S, R, N),
        ce.new_empty(2 * R + S, N),
        ce.new_empty((0,) if divergence == "forward" else (S, R, N)),
    )


@_forward.register_fake
def _(
    streams: Sequence[Tensor], targets: Tensor | None, students: int, temperature: float, divergence: str, *_: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate(streams, students, divergence)


@op("ensemble_kl_backward")
def _backward(
    d_ce: Tensor | None,
    d_kl: Tensor | None,
    streams: Sequence[Tensor],
    targets: Tensor | None,
    statistics: Tensor,
    mean_ratios: Tensor,
    wanted: Sequence[bool],
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> list[Tensor]:
    """The gradients of the students wanted, in their order."""
    S, R = len(wanted), len(streams)
    made = _allocate_gradients(streams, wanted)
    rows = None if targets is None else targets != ignore_index
    if d_kl is None or R == 1:  # no divergence takes part, so neither teachers nor temperature do
        sums = statistics[R : R + S] if temperature == 1 or R == 1 else statistics[2 * R :]
        streams, statistics, temperature, d_kl = streams[:S], torch.cat((statistics[:S], sums)), 1.0, None
    if targets is None and d_kl is None:
        return [gradient.zero_() for gradient in made]
    remaining = iter(made)
    _launch(
        streams,
        students=S,
        targets=None if targets is None else targets.contiguous(),
        ce_rows=rows,
        kl_rows=None if d_kl is None else rows,
        saved=(statistics, mean_ratios),
        gradients=[next(remaining) if want else None for want in wanted],
        weights=(d_ce, d_kl),
        temperature=temperature,
        divergence=divergence,
    )
    return made


def _allocate_gradients(streams: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, want in zip(streams, wanted, strict=False) if want
    ]


@_backward.register_fake
def _(d_ce: Tensor | None, d_kl: Tensor | None, streams: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    wanted: Sequence[bool] = rest[3]
    return _allocate_gradients(streams, wanted)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    streams, targets, students, *ctx.options = inputs
    ctx.wanted = [logits.requires_grad for logits in streams[:students]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*streams, targets, *output[2:])


def _differentiate(ctx: Any, d_ce: Tensor | None, d_kl: Tensor | None, *_: None) -> tuple:
    *streams, targets, statistics, mean_ratios = ctx.saved_tensors
    made = iter(_backward(d_ce, d_kl, streams, targets, statistics, mean_ratios, ctx.wanted, *ctx.options))
    gradients = [next(made) if want else None for want in ctx.wanted]
    return gradients + [None] * (len(streams) - len(ctx.wanted)), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
