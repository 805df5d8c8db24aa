"""Compares every op of `kernels/`, under every backend of this device, with its peers.

The peers are eager torch, torch.compile of the same code, and on a GPU Liger and flash-attn where they are installed.

    python benchmarks/ops.py                              all cases
    python benchmarks/ops.py ensemble_kl rms_norm --rounds 15 --threads 2 --csv ops.csv --plot plots
    python benchmarks/ops.py linear_ensemble_kl --budget  the time against the memory of a chunk

Losses, outputs and gradients of every variant are first compared with float64. A variant that differs or cannot run is
named instead of timed, and the exit status is 1. The others are timed as `benchmarks.timing` says.

The bytes of a case are those of every tensor that it reads and every tensor that it writes, once each: inputs, outputs
and gradients. `copy` moves as many bytes by `copy_`, half of them read and half written. Where the forward and the
backward pass are separate in a training step, `both` counts the bytes of each. A loss over logits is a single call for
its user, so its `both` counts logits and their gradients once, though the deferred form reads the logits twice.

`linear_ensemble_kl` is compared with `products` instead. These are its own matrix products alone, for all N tokens at
once, into tensors that exist already: logits, and each student's gradients of hidden states and head.

With --keep-freed-memory the process keeps the memory that it frees, as the engine does and a user's own process does
not. Otherwise large new tensors cost a CPU more than what is computed in them. It helps the peers most.

Memory is the peak of one call beyond its inputs, less the size of its results. On a GPU the times are the device's
alone, and `host ms` is what the host takes to launch a call: where it is longer, eager training waits for the host.

B sequences, L positions, N tokens, D hidden, H heads, V vocabulary, S students, K teachers, R = S + K streams.
"""

import argparse
import csv
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

import kernels
from benchmarks import timing
from benchmarks.peers import eager
from benchmarks.timing import Variant
from engine.system.distributed import keep_freed_memory
from engine.system.provenance import device_name
from kernels import dispatch
from kernels.ops.ensemble_kl.loss_spec import LossSpec

BACKENDS = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEBIBYTE = 2**20
SAMPLE_SECONDS = {"cpu": 0.005, "cuda": 0.0002}  # of a GPU's own time: around it come the launches and a cold cache
BUDGETS = (16, 32, 64, 128, 256)  # MiB

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Way:
    """One way to compute a case: a differentiable `forward`, or a `single_pass` for outputs and gradients at once."""

    forward: Callable[..., Tensors] | None = None
    single_pass: Callable[..., tuple[Tensors, Tensors]] | None = None
    backend: str | None = None  # of `kernels`; it is chosen before each call, outside the clock
    overwrites: bool = (
        False  # whether it overwrites its inputs or cotangents; it then gets copies made outside the clock
    )
    chunk_bytes: int | None = None  # of `linear_ensemble_kl`, set in the same way


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    inputs: Callable[[Generator], list[Tensor]]  # random; those that require gradients are differentiated
    eager: Callable[..., Tensors]
    ours: Callable[..., Tensors]
    phases: dict[str, int]  # the bytes that it must move in forward, backward, both
    single_pass: Callable[..., tuple[Tensors, Tensors]] | None = None
    peers: dict[str, Way] = field(default_factory=dict)
    products: Callable[[Tensors], Callable[[], object]] | None = None  # instead of `copy`, from a set of inputs
    backends: tuple[str, ...] | None = None  # where they are not those of the device

    @property
    def baseline(self) -> str:
        return "copy" if self.products is None else "products"


@dataclass(frozen=True)
class Row:
    """What the table and the CSV show of one variant; ratios and times are medians, with 20% and 80% quantiles."""

    op: str
    case: str
    phase: str
    variant: str
    milliseconds: float
    milliseconds_low: float
    milliseconds_high: float
    bytes: int
    baseline: str
    over_baseline: float  # its time over the baseline's
    over_baseline_low: float
    over_baseline_high: float
    share_of_copy: float | None  # bytes over time, as a share of the copy's
    faster_than_eager: float | None
    faster_than_compile: float | None
    host_milliseconds: float | None  # a GPU's: how long the host took to launch it, which `milliseconds` leaves out
    peak_mebibytes: float
    control_spread: float
    void: bool


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yields cases in the sizes of a training step of small students, and in larger ones."""
    large = device.type == "cuda"
    ensembles = [(3, 3), (1, 3)] if not large else [(3, 3), (1, 3), (1, 2), (1, 5), (2, 2), (4, 4)]
    for students, streams in ensembles:
        yield ensemble_kl(device, dtype, 4096 if large else 1024, 16000, students, streams)
    yield linear_ensemble_kl(device, dtype, 4096 if large else 1024, 16000, 256, 3, 3)
    for tokens, width in ((1024, 256), (8192, 1024)):
        yield rms_norm(device, dtype, tokens, width)
        yield rms_norm_residual(device, dtype, tokens, width)
    for shape in ((8, 128, 8, 32), (8, 1024, 16, 64)):
        yield rotary(device, dtype, *shape)
    for tokens, width in ((1024, 768), (8192, 2816)):
        yield swiglu(device, dtype, tokens, width)
    for shape in ((8, 128, 8, 8, 32), (8, 1024, 16, 4, 64)):
        yield attention(device, dtype, *shape)


def ensemble_kl(
    device: torch.device, dtype: torch.dtype, tokens: int, vocab_size: int, students: int, streams: int
) -> Case:
    targets_shape, stream_bytes = (tokens,), tokens * vocab_size * dtype.itemsize

    def inputs(generator: Generator) -> list[Tensor]:
        logits = [
            (2 * normal(generator, (tokens, vocab_size), device, dtype)).requires_grad_(r < students)
            for r in range(streams)
        ]
        return [*logits, torch.randint(vocab_size, targets_shape, generator=generator, device=device)]

    def ours(*tensors: Tensor) -> Tensors:
        *logits_RNV, targets_N = tensors
        result = kernels.ensemble_kl(logits_RNV, targets_N, students=students)
        return tuple((result.ce.mean(-1) + result.kl.sum(1).mean(-1) / (streams - 1)).unbind())

    def single_pass(*tensors: Tensor) -> tuple[Tensors, Tensors]:
        *logits_RNV, targets_N = tensors
        ce_weight_S = torch.full((students,), 1 / tokens, device=device)
        kl_weight_SR = torch.full((students, streams), 1 / tokens / (streams - 1), device=device)
        logits_RNV = [logits.detach() for logits in logits_RNV]
        ce_SN, kl_SRN, gradients = ensemble_kl_at_once(logits_RNV, targets_N, ce_weight_S, kl_weight_SR)
        losses_S = (ce_SN.sum(-1) + kl_SRN.sum((1, 2)) / (streams - 1)) / tokens
        return losses_S.unbind(), gradients

    def by(losses: Callable[..., Tensors]) -> Callable[..., Tensors]:
        return lambda *tensors: losses(tensors[:-1], tensors[-1], students)

    return Case(
        "ensemble_kl",
        f"N={tokens} V={vocab_size} S={students} R={streams} {short(dtype)}",
        inputs,
        by(eager.ensemble_losses),
        ours,
        {
            "forward": streams * stream_bytes,
            "backward": (streams + students) * stream_bytes,
            "both": (streams + students) * stream_bytes,
        },
        single_pass,
        liger(device, "ensemble_losses", by),
    )


def ensemble_kl_at_once(
    logits_RNV: Tensors, targets_N: Tensor, ce_weight_S: Tensor, kl_weight_SR: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    """Returns ce [S, N], kl [S, R, N] and the students' gradients, by the single pass of `linear_ensemble_kl`.

    Triton's and the native backend write the gradients over the students' logits.
    """
    rows_N, students = targets_N != -100, len(ce_weight_S)
    module = dispatch.implementation("ensemble_kl", targets_N)
    objective = LossSpec(targets_N, ce_weight_S, kl_weight_SR, rows_N, rows_N, 1.0, "forward")
    gradients = logits_RNV[:students]
    if dispatch.current() == "native":
        ce_SN, kl_SRN = module.loss_and_grad_(logits_RNV, gradients, objective)
        return ce_SN, kl_SRN, gradients
    if dispatch.current() == "triton":
        ce_SN, kl_SRN = module.loss_and_grad(logits_RNV, gradients, objective, logits_RNV[0].shape[1])
        return ce_SN, kl_SRN, gradients
    wide = [eager.at_least_fp32(logits) for logits in logits_RNV]
    return module.loss_and_grad(wide, objective, [True] * students)


def linear_ensemble_kl(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    vocab_size: int,
    hidden: int,
    students: int,
    streams: int,
) -> Case:
    def inputs(generator: Generator) -> list[Tensor]:
        tensors: list[Tensor] = []
        for r in range(streams):
            tensors.append(normal(generator, (tokens, hidden), device, dtype).requires_grad_(r < students))
            weight = 2 * hidden**-0.5 * normal(generator, (vocab_size, hidden), device, dtype)
            tensors.append(weight.requires_grad_(r < students))
        return [*tensors, torch.randint(vocab_size, (tokens,), generator=generator, device=device)]

    ce_weight_S = torch.ones(students, device=device)
    kl_weight_SR = torch.full((students, streams), 1 / (streams - 1), device=device)

    def ours(*tensors: Tensor) -> Tensors:
        projected = [kernels.Projected(*pair, None) for pair in zip(tensors[:-1:2], tensors[1:-1:2], strict=True)]
        result = kernels.linear_ensemble_kl(
            projected[:students],
            projected[students:],
            tensors[-1],
            ce_weight=ce_weight_S,
            kl_weight=kl_weight_SR,
            normalizer=tokens,
        )
        return result.losses

    def by(losses: Callable[..., Tensors]) -> Callable[..., Tensors]:
        def forward(*tensors: Tensor) -> Tensors:
            logits = [h @ w.T for h, w in zip(tensors[:-1:2], tensors[1:-1:2], strict=True)]
            return losses(logits, tensors[-1], students)

        return forward

    def products(tensors: Tensors) -> Callable[[], object]:
        pairs = [(h.detach(), w.detach()) for h, w in zip(tensors[:-1:2], tensors[1:-1:2], strict=True)]
        logits_NV = torch.empty(tokens, vocab_size, dtype=dtype, device=device)
        d_logits_NV = torch.randn(tokens, vocab_size, dtype=dtype, device=device)
        d_pairs = [(torch.empty_like(h), torch.empty_like(w)) for h, w in pairs[:students]]

        def run() -> None:
            for hidden_ND, weight_VD in pairs:
                torch.mm(hidden_ND, weight_VD.T, out=logits_NV)
            for (hidden_ND, weight_VD), (d_hidden_ND, d_weight_VD) in zip(pairs, d_pairs, strict=False):
                torch.mm(d_logits_NV, weight_VD, out=d_hidden_ND)
                torch.mm(d_logits_NV.T, hidden_ND, out=d_weight_VD)

        return run

    pair_bytes = (tokens + vocab_size) * hidden * dtype.itemsize
    return Case(
        "linear_ensemble_kl",
        f"N={tokens} V={vocab_size} D={hidden} S={students} R={streams} {short(dtype)}",
        inputs,
        by(eager.ensemble_losses),
        ours,
        {"both": (streams + students) * pair_bytes},
        peers=liger(device, "ensemble_losses", by),
        products=products,
    )


def rms_norm(device: torch.device, dtype: torch.dtype, tokens: int, hidden: int) -> Case:
    def functional(x: Tensor, weight: Tensor) -> Tensors:
        return (torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6),)

    def ours(x: Tensor, weight: Tensor) -> Tensors:
        return (kernels.rms_norm(x, weight),)

    shapes, label = ((tokens, hidden), (hidden,)), f"N={tokens} D={hidden}"
    case = elementwise(device, dtype, "rms_norm", label, shapes, eager.rms_norm, ours, forward=2, backward=3)
    return replace(case, peers={"F.rms_norm": Way(functional)} | case.peers)


def rms_norm_residual(device: torch.device, dtype: torch.dtype, tokens: int, hidden: int) -> Case:
    """Returns a case that reads x and residual and writes two outputs.

    Its backward pass reads their sum and two cotangents, and writes one gradient.
    """

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Tensors:
        return kernels.rms_norm(x, weight, residual=residual)

    shapes, label = ((tokens, hidden), (tokens, hidden), (hidden,)), f"residual N={tokens} D={hidden}"
    plain = eager.rms_norm_residual
    case = elementwise(device, dtype, "rms_norm", label, shapes, plain, ours, forward=4, backward=4)
    return replace(case, peers=liger(device, "rms_norm_residual"))


def rotary(device: torch.device, dtype: torch.dtype, batch: int, length: int, heads: int, width: int) -> Case:
    def inputs(generator: Generator) -> list[Tensor]:
        q, k = (normal(generator, (batch, length, heads, width), device, dtype).requires_grad_() for _ in range(2))
        angle = torch.rand(length, width // 2, generator=generator, device=device)
        return [q, k, angle.cos(), angle.sin()]

    def flash(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
        apply = importlib.import_module("flash_attn.layers.rotary").apply_rotary_emb
        return tuple(apply(x, cos.to(x.dtype), sin.to(x.dtype)) for x in (q, k))

    peers = liger(device, "rotary")
    if device.type == "cuda" and find_spec("flash_attn") is not None:
        peers["flash-attn"] = Way(flash)
    moved = 4 * batch * length * heads * width * dtype.itemsize
    return Case(
        "rotary",
        f"B={batch} L={length} H={heads} d={width} {short(dtype)}",
        inputs,
        eager.rotary,
        kernels.rotary,
        phases(forward=moved, backward=moved),
        peers=peers,
    )


def swiglu(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> Case:
    def ours(gate: Tensor, up: Tensor) -> Tensors:
        return (kernels.swiglu(gate, up),)

    shapes, label = ((tokens, width), (tokens, width)), f"N={tokens} F={width}"
    return elementwise(device, dtype, "swiglu", label, shapes, eager.swiglu, ours, forward=3, backward=5)


def elementwise(
    device: torch.device,
    dtype: torch.dtype,
    op: str,
    label: str,
    shapes: Sequence[tuple[int, ...]],
    plain: Callable[..., Tensors],
    ours: Callable[..., Tensors],
    *,
    forward: int,
    backward: int,
) -> Case:
    """Returns the case of an operation on normally distributed inputs of `shapes`, all differentiated.

    Args:
        forward, backward: how many tensors of the first shape the pass reads and writes.
    """

    def inputs(generator: Generator) -> list[Tensor]:
        return [normal(generator, shape, device, dtype).requires_grad_() for shape in shapes]

    tensor_bytes = math.prod(shapes[0]) * dtype.itemsize
    moved = phases(forward=forward * tensor_bytes, backward=backward * tensor_bytes)
    return Case(op, f"{label} {short(dtype)}", inputs, plain, ours, moved, peers=liger(device, op))


def attention(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, heads: int, kv_heads: int, width: int
) -> Case:
    """Returns a case of causal attention. On a GPU our backend is flash-attn or none, and has that name there."""

    def inputs(generator: Generator) -> list[Tensor]:
        shapes = [(batch, length, count, width) for count in (heads, kv_heads, kv_heads)]
        return [normal(generator, shape, device, dtype).requires_grad_() for shape in shapes]

    def functional(*tensors: Tensor) -> Tensors:
        q, k, v = (x.transpose(1, 2) for x in tensors)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return (attended.transpose(1, 2),)

    def ours(*tensors: Tensor) -> Tensors:
        return (kernels.attention(*tensors),)

    flash = device.type == "cuda" and find_spec("flash_attn") is not None
    of_heads = batch * length * width * dtype.itemsize
    return Case(
        "attention",
        f"B={batch} L={length} H={heads} H_kv={kv_heads} d={width} {short(dtype)}",
        inputs,
        functional,
        ours,
        phases(forward=2 * of_heads * (heads + kv_heads), backward=4 * of_heads * (heads + kv_heads)),
        peers={"flash-attn": Way(ours, backend="auto")} if flash else {},
        backends=None if device.type == "cpu" else ("reference",),
    )


def phases(*, forward: int, backward: int) -> dict[str, int]:
    return {"forward": forward, "backward": backward, "both": forward + backward}


def normal(generator: Generator, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def short(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def liger(
    device: torch.device, name: str, wrap: Callable[[Callable], Callable] = lambda function: function
) -> dict[str, Way]:
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return {}
    return {"liger": Way(wrap(getattr(importlib.import_module("benchmarks.peers.liger"), name)), overwrites=True)}


def ways(case: Case, device: torch.device) -> dict[str, Way]:
    """Every variant of a case by its name in the table.

    Where the reference has a single pass, its differentiable form is the definition, to be differentiated twice; nobody
    trains with it, and one call takes half a minute.
    """
    named_ways = {}
    for backend in case.backends or BACKENDS[device.type]:
        if case.single_pass is not None:
            named_ways[f"{backend} (single pass)"] = Way(single_pass=case.single_pass, backend=backend, overwrites=True)
        if case.single_pass is None or backend != "reference":
            named_ways[backend] = Way(case.ours, backend=backend)
    compiled = torch.compile(case.eager, fullgraph=True, dynamic=False)
    return named_ways | {"eager": Way(case.eager), "compile": Way(compiled)} | case.peers


def budgets(case: Case, device: torch.device) -> dict[str, Way]:
    """Returns `linear_ensemble_kl` with chunks of several sizes, under the default backend of this device."""
    with kernels.backend("auto"):
        backend = dispatch.implementation(case.op, torch.empty(0, device=device)).__name__.rpartition(".")[2]
    return {f"{backend} {size} MiB": Way(case.ours, backend=backend, chunk_bytes=size * MEBIBYTE) for size in BUDGETS}


def choose(way: Way, device: torch.device) -> None:
    """Sets the backend and the chunk size that a way asks for, outside the clock."""
    if way.backend is not None:
        kernels.backend(way.backend)
    if way.chunk_bytes is not None:
        module = importlib.import_module(f"kernels.ops.linear_ensemble_kl.{way.backend}")
        if way.backend == "reference":
            module.CHUNK_BYTES[device.type] = way.chunk_bytes
        else:
            setattr(module, "BUDGET" if way.backend == "native" else "CHUNK_BYTES", way.chunk_bytes)


def fresh(tensors: Tensors) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]


def evaluate(way: Way, inputs: Tensors, cotangents: Tensors) -> tuple[Tensors, Tensors]:
    """Returns the outputs, and the gradients of those inputs that require one."""
    if way.single_pass is not None:
        return way.single_pass(*inputs)
    assert way.forward is not None
    outputs = way.forward(*inputs)
    return outputs, torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], cotangents)


def variant(way: Way, phase: str, sets: Sequence[Tensors], cotangents: Sequence[Tensors]) -> Variant:
    device = sets[0][0].device

    def prepare(number: int) -> Any:
        choose(way, device)
        inputs, given = sets[number % len(sets)], cotangents[number % len(sets)]
        if way.overwrites:
            inputs, given = fresh(inputs), fresh(given)
            for x in sets[(number + 1) % len(sets)]:
                x.sum()  # pushes out of the cache what copying left there
        if phase != "backward":
            return inputs, given
        assert way.forward is not None
        return way.forward(*inputs), [x for x in inputs if x.requires_grad], given

    def forward(state: Any) -> object:
        assert way.forward is not None
        return way.forward(*state[0])

    run = {"forward": forward, "backward": lambda s: torch.autograd.grad(*s), "both": lambda s: evaluate(way, *s)}
    return Variant(run[phase], prepare)


def copy(nbytes: int, dtype: torch.dtype, device: torch.device) -> Variant:
    """Returns a `copy_` that moves `nbytes`, half of them read and half written."""
    elements = max(1, nbytes // 2 // dtype.itemsize)
    pairs = [
        (torch.empty(elements, dtype=dtype, device=device), torch.randn(elements, device=device).to(dtype))
        for _ in range(timing.input_sets(nbytes))
    ]
    return Variant(lambda pair: pair[0].copy_(pair[1]), lambda number: pairs[number % len(pairs)])


def exact_results(case: Case, inputs: Tensors, cotangents: Tensors) -> list[Tensor]:
    def double(tensors: Tensors) -> list[Tensor]:
        return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]

    outputs, gradients = evaluate(Way(case.eager), double(inputs), double(cotangents))
    return [*outputs, *gradients]


def errors(results: Tensors, exact: Tensors) -> list[float]:
    """Returns the largest error of each tensor, relative to the tensor's largest element."""
    return [
        ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-300)).item()
        for got, want in zip(results, exact, strict=True)
    ]


def refusals(case: Case, named_ways: dict[str, Way], inputs: Tensors, cotangents: Tensors) -> dict[str, str]:
    """Returns the variants that are not timed, and why.

    They cannot run, or their error is more than three times that of eager torch plus an allowance: 64 units of fp32's
    precision or two of the storage's, in the largest element (Liger rounds losses to the storage's precision).
    """
    exact = exact_results(case, inputs, cotangents)
    allowed = max(64 * torch.finfo(torch.float32).eps, 2 * torch.finfo(inputs[0].dtype).eps)
    bounds = [
        3 * error + allowed
        for error in errors([x for part in evaluate(Way(case.eager), inputs, cotangents) for x in part], exact)
    ]
    refused = {}
    for name, way in named_ways.items():
        try:
            choose(way, inputs[0].device)
            outputs, gradients = evaluate(way, fresh(inputs), fresh(cotangents))
            for error, bound in zip(errors([*outputs, *gradients], exact), bounds, strict=True):
                if not error <= bound:
                    raise ArithmeticError(f"differs from float64 by {error:.1e}, over {bound:.1e}")
        except Exception as error:  # A peer may fail in any way; the others are measured all the same.
            refused[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return refused


def beyond_results(run: Callable[[Any], object], state: Any, device: torch.device) -> int:
    """Returns the bytes of the peak of `run`'s memory beyond what is in `state` and in its results."""
    results: list[Tensor] = []

    def keep() -> None:
        results.extend(tensors_in(run(state)))

    peak = timing.peak_bytes(keep, device)
    given = {x.untyped_storage().data_ptr() for x in tensors_in(state)}
    of_results = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    return max(0, peak - sum(nbytes for pointer, nbytes in of_results.items() if pointer not in given))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def measure(
    case: Case, named_ways: dict[str, Way], device: torch.device, rounds: int
) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows of one case, and the variants that are missing with the reason."""
    generator = Generator(device=device).manual_seed(0)
    first = case.inputs(generator)
    size = sum(x.nbytes for x in first)
    sets = [first, *(case.inputs(generator) for _ in range(timing.input_sets(size) - 1))]
    outputs = case.eager(*first)
    cotangents = [
        [torch.ones_like(x) if x.ndim == 0 else torch.randn(x.shape, device=device).to(x.dtype) for x in outputs]
        for _ in sets
    ]
    del outputs
    refused = refusals(case, named_ways, sets[0], cotangents[0])
    rows = []
    for phase, nbytes in case.phases.items():
        variants = {
            name: variant(way, phase, sets, cotangents)
            for name, way in named_ways.items()
            if name not in refused and (way.forward is not None or phase == "both")
        }
        if case.products is None:
            variants["copy"] = copy(nbytes, first[0].dtype, device)
        else:
            run = case.products(first)
            variants["products"] = Variant(lambda _, run=run: run(), lambda number: None)
        clock = timing.clock_of(device)
        compared = timing.compare(
            variants, case.baseline, clock, rounds=rounds, sample_seconds=SAMPLE_SECONDS[device.type]
        )
        rows += [
            row(
                case,
                phase,
                name,
                compared,
                timing.host_seconds(clock, way.run),
                beyond_results(way.run, way.prepare(0), device),
            )
            for name, way in variants.items()
        ]
    return rows, refused


def row(case: Case, phase: str, name: str, compared: timing.Comparison, host_seconds: float | None, peak: int) -> Row:
    seconds, over = compared.time(name), compared.ratio(name, case.baseline)

    def faster_than(peer: str) -> float | None:
        return compared.ratio(peer, name).median if peer in compared.seconds and name != peer else None

    return Row(
        op=case.op,
        case=case.name,
        phase=phase,
        variant=name,
        milliseconds=1000 * seconds.median,
        milliseconds_low=1000 * seconds.low,
        milliseconds_high=1000 * seconds.high,
        bytes=case.phases[phase],
        baseline=case.baseline,
        over_baseline=over.median,
        over_baseline_low=over.low,
        over_baseline_high=over.high,
        share_of_copy=1 / over.median if case.baseline == "copy" else None,
        faster_than_eager=faster_than("eager"),
        faster_than_compile=faster_than("compile"),
        host_milliseconds=None if host_seconds is None else 1000 * host_seconds,
        peak_mebibytes=peak / MEBIBYTE,
        control_spread=compared.spread,
        void=compared.void,
    )


def table(rows: Sequence[Row]) -> str:
    """Returns the rows of one case and phase as a table."""
    first = rows[0]
    state = f"{'VOID: ' if first.void else ''}control spreads over {first.control_spread:.1%}"
    lines = [f"{first.op}  {first.case}  {first.phase}  ({first.bytes / 1e6:.1f} MB; {state})"]
    heading = f"  {'':26}{'ms':>10}  {'20% to 80%':>19}  {'× ' + first.baseline:>10}  {'20% to 80%':>15}"
    lines.append(f"{heading}  {'eager ÷':>8}  {'compile ÷':>9}  {'MiB':>8}  {'host ms':>8}".rstrip())
    for r in sorted(rows, key=lambda r: r.milliseconds):
        eager_ratio, compile_ratio, host = (
            "" if x is None else f"{x:.2f}" for x in (r.faster_than_eager, r.faster_than_compile, r.host_milliseconds)
        )
        lines.append(
            f"  {r.variant:26}{r.milliseconds:10.3f}  {r.milliseconds_low:9.3f} {r.milliseconds_high:9.3f}"
            f"  {r.over_baseline:10.2f}  {r.over_baseline_low:7.2f} {r.over_baseline_high:7.2f}"
            f"  {eager_ratio:>8}  {compile_ratio:>9}  {r.peak_mebibytes:8.1f}  {host:>8}".rstrip()
        )
    return "\n".join(lines) + "\n"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Draws one chart per case: each phase's and variant's time over the baseline's, with its quantiles."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    for op, case in dict.fromkeys((r.op, r.case) for r in rows):
        of_case = [r for r in rows if (r.op, r.case) == (op, case)]
        figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(of_case)), layout="constrained")
        values = [r.over_baseline for r in of_case]
        below = [r.over_baseline - r.over_baseline_low for r in of_case]
        above = [r.over_baseline_high - r.over_baseline for r in of_case]
        axes.barh(range(len(of_case)), values, xerr=[below, above], color="#4477aa", ecolor="#222222", height=0.7)
        axes.set_yticks(range(len(of_case)), [f"{r.phase}: {r.variant}" for r in of_case])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel(f"time ÷ {of_case[0].baseline}'s, median of rounds, 20% to 80%")
        axes.set_title(f"{op}  {case}" + ("  (VOID in part)" if any(r.void for r in of_case) else ""))
        name = f"{op} {case}".replace(" ", "-").replace("=", "")
        figure.savefig(folder / f"{name}.svg")
        plt.close(figure)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("select", nargs="*", help="ops, or any part of 'op case', such as 'S=1'; default: all")
    parser.add_argument("--variants", nargs="+", help="time only these, and the baseline")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=BACKENDS)
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--keep-freed-memory", action="store_true", help="as the engine does, for every variant")
    parser.add_argument("--budget", action="store_true", help="linear_ensemble_kl with chunks of 16 to 256 MiB")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    chosen = arguments(argv)
    if chosen.keep_freed_memory:
        keep_freed_memory()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    dtype = DTYPES[chosen.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    known = [case for case in cases(device, dtype) if not chosen.budget or case.op == "linear_ensemble_kl"]
    selected = [c for c in known if not chosen.select or any(part in f"{c.op} {c.name}" for part in chosen.select)]
    if not selected:
        print(
            f"error: {' '.join(chosen.select)}: none of {', '.join(f'{c.op} {c.name}' for c in known)}", file=sys.stderr
        )
        return 2
    print(f"{device_name(device)}, torch {torch.__version__}, {chosen.rounds} rounds\n")
    rows, complete = [], True
    for case in selected:
        torch._dynamo.reset()  # Compiled too often for different cases, a function would silently run eagerly.
        named_ways = budgets(case, device) if chosen.budget else ways(case, device)
        named_ways = {name: way for name, way in named_ways.items() if not chosen.variants or name in chosen.variants}
        fresh_rows, refused = measure(case, named_ways, device, chosen.rounds)
        for phase in case.phases:
            print(table([r for r in fresh_rows if r.phase == phase]), flush=True)
        for name, reason in refused.items():
            print(f"  not timed: {name}: {reason}\n", flush=True)
        rows += fresh_rows
        complete &= not refused
        if chosen.csv is not None:  # So a run that is stopped leaves what it has measured.
            write_csv(rows, chosen.csv)
    if chosen.plot is not None:
        plot(rows, chosen.plot)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
