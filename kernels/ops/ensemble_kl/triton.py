"""`ensemble_kl` on a GPU. It launches `triton_kernel.py`, once for losses and once for gradients, or once for both.

Shapes: N tokens, V vocabulary, S students, K teachers, R = S + K streams.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import launch
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.ensemble_kl.triton_kernel import ensemble_kl_kernel
from kernels.registration import op


class Gpu(NamedTuple):
    """What `launch` needs to know about a device: threads of a warp, and whether fp32 is computed on register pairs."""

    lanes: int
    paired: bool


@functools.cache
def _gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu(32, False)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.warp_size, torch.version.hip is None and properties.major >= 10)


def run(
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
    gpu: Gpu | None = None,
) -> None:
    """Launches `ensemble_kl_kernel`, with one program per token.

    Args:
        logits: R tensors [N, W]. students: S. targets, ce_rows, kl_rows, kl_scale: As in the kernel.
        losses: (ce [S, N], kl [S, R, N] or None), to be written. None: only gradients are computed.
        saved: (statistics, mean_ratios), which are written with losses and read without.
        gradients: S tensors [N, W], or None where unwanted. None: only losses are computed.
        weights: d/d ce [S, N] and d/d kl [S, R, N], which may be expanded. A kl weight of None: no pair is compared.
        vocabulary: V. None: W.
        gpu: None: that of the logits.
    """
    (tokens, width), streams = logits[0].shape, len(logits)
    if not tokens:
        return
    gpu = gpu or _gpu_of(logits[0].device)
    ce_weight, kl_weight = weights
    itemsizes = [x.element_size() for x in logits]
    vector, plain = 16 // min(itemsizes), divergence == "forward" and len({*itemsizes}) == 1
    chosen = launch.ensemble_kl(width, students, streams, vector, gpu.lanes, plain=plain, paired=gpu.paired)
    lanes = gpu.lanes * chosen.warps
    places = [logits[0] if g is None else g for g in gradients or ()]
    constants = {
        "S": students,
        "DIVERGENCE": divergence,
        "TEMPERED": temperature != 1,
        "UNIT": all(x.stride(1) == 1 for x in (*logits, *places)),
        "BLOCKS": chosen.block // (lanes * vector) if chosen.block >= width else 0,
        "PARTS": chosen.parts,
        "SWEEPS": chosen.sweeps,
        "LANES": lanes,
        "VEC": vector,
        "num_warps": chosen.warps,
        "num_stages": 1,
    }
    with torch.cuda.device_of(logits[0]):
        ensemble_kl_kernel[(tokens,)](
            tuple(logits),
            _strides(logits),
            None if gradients is None else tuple(gradients),
            None if gradients is None else _strides(places),
            targets,
            ce_rows,
            kl_rows,
            *(losses or (None, None)),
            *(saved or (None, None)),
            ce_weight,
            None if ce_weight is None else ce_weight.stride(),
            kl_weight,
            None if kl_weight is None else kl_weight.stride(),
            kl_scale,
            tokens,
            None if vocabulary == width else vocabulary,
            width,
            temperature,
            **constants,
        )


def _strides(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride())


def loss_and_grad(
    logits: Sequence[Tensor], gradients: Sequence[Tensor | None], spec: LossSpec, vocabulary: int
) -> tuple[Tensor, Tensor | None]:
    """Computes `loss_and_grad` of `reference.py` in fp32, in one launch (two if S > 4).

    Args:
        logits: R tensors [N, W] of fp32, bf16 or fp16, W >= V. Columns from V on are padding and may hold anything.
        gradients: S tensors [N, W] of any of these dtypes, to be written, or None where unwanted. They may be the
            students' logits themselves.
        spec: Without `kl_weight`, the teachers' logits are not read.
        vocabulary: V.
    """
    targets, ce_weight, kl_weight, ce_rows, kl_rows, temperature, divergence = spec
    S, N = len(gradients), len(targets)
    ce, kl, statistics, mean_ratios = _allocate(logits, S, divergence)
    saved, losses, weights = (statistics, mean_ratios), (ce, kl), (ce_weight[:, None].expand(S, N), None)
    if kl_weight is None or len(logits) == 1:
        logits, losses, temperature = logits[:S], (ce, None), 1.0  # No divergence needs the rest.
        kl.zero_()
    else:
        weights = weights[0], kl_weight[:, :, None].expand(S, -1, N)
    sweep = functools.partial(
        run,
        logits,
        students=S,
        targets=targets,
        ce_rows=ce_rows,
        kl_rows=kl_rows,
        kl_scale=temperature**2,
        vocabulary=vocabulary,
        temperature=temperature,
        divergence=divergence,
    )
    wanted_gradients = gradients if any(g is not None for g in gradients) else None
    if losses[1] is not None and S > launch.STUDENTS_AT_ONCE:
        sweep(losses=losses, saved=saved)
        if wanted_gradients is not None:
            sweep(saved=saved, gradients=wanted_gradients, weights=weights)
    else:
        sweep(losses=losses, gradients=wanted_gradients, weights=weights)
    return ce, None if kl_weight is None else kl


def ensemble_kl(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ensemble_kl`. It is differentiable once.

    Raises:
        ValueError: A stream is float64.
    """
    for r, logits in enumerate(streams):
        if logits.dtype == torch.float64:
            raise ValueError(
                f"stream {r} is {logits.dtype}: the Triton kernel computes in fp32; convert it, or choose"
                " kernels.backend('reference')"
            )
    rows = None if targets is None else targets != ignore_index
    targets = None if targets is None else targets.contiguous()
    temperature = 1.0 if len(streams) == 1 else float(temperature)  # No divergence needs it.
    return _forward(list(streams), targets, rows, students, temperature, divergence)[:2]


@op("ensemble_kl")
def _forward(
    streams: Sequence[Tensor],
    targets: Tensor | None,
    rows: Tensor | None,
    students: int,
    temperature: float,
    divergence: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ce, kl, and what the kernel saves for the backward pass: statistics and mean_ratios."""
    outputs = ce, kl, statistics, mean_ratios = _allocate(streams, students, divergence)
    pairs = len(streams) > 1
    if targets is None:
        ce.zero_()
    if not pairs:
        kl.zero_()
    run(
        streams,
        students=students,
        targets=targets,
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


_forward.register_fake(
    lambda streams, targets, rows, students, temperature, divergence: _allocate(streams, students, divergence)
)


@op("ensemble_kl_backward")
def _backward(
    d_ce: Tensor | None,
    d_kl: Tensor | None,
    streams: Sequence[Tensor],
    targets: Tensor | None,
    rows: Tensor | None,
    statistics: Tensor,
    mean_ratios: Tensor,
    wanted: Sequence[bool],
    temperature: float,
    divergence: str,
) -> list[Tensor]:
    """Returns the gradients of the wanted students, in their order."""
    gradients = _allocate_gradients(streams, wanted)
    remaining = iter(gradients)
    run(
        streams,
        students=len(wanted),
        targets=targets,
        ce_rows=rows,
        kl_rows=rows,
        saved=(statistics, mean_ratios),
        gradients=[next(remaining) if want else None for want in wanted],
        weights=(d_ce, d_kl),
        temperature=temperature,
        divergence=divergence,
    )
    return gradients


def _allocate_gradients(streams: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, want in zip(streams, wanted, strict=False) if want]


_backward.register_fake(lambda d_ce, d_kl, streams, *rest: _allocate_gradients(streams, wanted=rest[4]))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    streams, targets, rows, students, *ctx.options = inputs
    ctx.wanted = [logits.requires_grad for logits in streams[:students]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*streams, targets, rows, *output[2:])


def _differentiate(ctx: Any, d_ce: Tensor | None, d_kl: Tensor | None, *_: None) -> tuple:
    *streams, targets, rows, statistics, mean_ratios = ctx.saved_tensors
    remaining = iter(_backward(d_ce, d_kl, streams, targets, rows, statistics, mean_ratios, ctx.wanted, *ctx.options))
    gradients = [next(remaining) if want else None for want in ctx.wanted]
    return gradients + [None] * (len(streams) - len(ctx.wanted)), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
