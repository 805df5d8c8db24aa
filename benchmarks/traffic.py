"""Counts the bytes that each op moves, without a GPU.

    python benchmarks/traffic.py [--only REGEX] [--csv FILE]

Triton's kernels, ours and Liger's, run in Triton's interpreter, where every load and store counts as far as its mask
lets it through. For torch's operations every input and output counts once, without views and broadcast dimensions: this
is what eager execution moves if each operation reads all of its inputs. Bytes are printed per element (of x, of q and
k, or of [N, V]) beside the floor. The floor is what the op must move if every number crosses once, or once per pass for
`ensemble_kl` where a row does not stay on chip.

Shapes: N tokens, D hidden, B sequences, L positions, V vocabulary, S students, K teachers, R = S + K streams.
"""

import argparse
import csv
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from functools import cache, partial
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

import kernels
from benchmarks.peers import eager
from kernels.ops.ensemble_kl import triton as ensemble_kl
from kernels.ops.ensemble_kl.loss_spec import LossSpec
from kernels.ops.rms_norm import triton as rms_norm
from kernels.ops.rotary import triton as rotary
from kernels.ops.swiglu import triton as swiglu

BYTES = 2  # of an element in storage: bf16 throughout


class Traffic(TorchDispatchMode):
    """Counts the bytes that torch's operations move in its `with` block; in `counted` also those of the interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = 0
        self.stored = 0
        self.in_kernel = False  # The interpreter's own torch operations do not count.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "creche_triton":  # What it calls is run under this counter.
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if not (self.in_kernel or func.is_view or "empty" in func._opname):
            self.loaded += sum(_extent(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self.stored += sum(_extent(x) for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


@contextmanager
def counted() -> Iterator[Traffic]:
    with prepared_once():
        yield from _counted()


def _counted() -> Iterator[Traffic]:
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch, convert = GridExecutor.__call__, interpreter._implicit_cvt

    def counted_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded += _taken(ptrs, mask)
        return load(builder, ptrs, mask, *rest)

    def counted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += _taken(ptrs, mask)
        return store(builder, ptrs, value, mask, *rest)

    def counted_launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        traffic.in_kernel = True
        try:
            with np.errstate(all="ignore"):  # The interpreter computes nonsense in Liger's bf16.
                launch(executor, *args, **kwargs)
        finally:
            traffic.in_kernel = False

    def as_on_a_gpu(argument: Any) -> Any:
        """Converts a float to an fp32 tensor, whose methods Liger calls; the interpreter leaves it a float."""
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(GridExecutor, "__call__", counted_launch),
        mock.patch.object(interpreter, "_implicit_cvt", as_on_a_gpu),
        traffic,
    ):
        yield traffic


@contextmanager
def prepared_once() -> Iterator[None]:
    """Halves the interpreter's time.

    The interpreter puts its own functions into `triton.language` at every call of a device function, which takes 2 ms,
    though it has done so at the beginning of the launch.
    """
    prepare, launch = interpreter._patch_lang, GridExecutor.__call__
    ready: set[int] = set()

    def prepare_once(fn: Any) -> Any:
        modules = {id(module) for module in fn.__globals__.values() if module is tl or module is tl.core}
        if modules <= ready:
            return interpreter._LangPatchScope()
        ready.update(modules)
        return prepare(fn)

    def launch_anew(executor: Any, *args: Any, **kwargs: Any) -> None:
        ready.clear()
        launch(executor, *args, **kwargs)

    with (
        mock.patch.object(interpreter, "_patch_lang", prepare_once),
        mock.patch.object(GridExecutor, "__call__", launch_anew),
    ):
        yield


def _taken(ptrs: Any, mask: Any) -> int:
    lanes = np.count_nonzero(np.broadcast_to(mask.data, ptrs.data.shape))
    return int(lanes) * max(8, ptrs.get_element_ty().primitive_bitwidth) // 8


def _extent(x: Tensor) -> int:
    return x.element_size() * int(np.prod([size for size, step in zip(x.shape, x.stride(), strict=True) if step]))


@dataclass(frozen=True)
class Case:
    """One op to measure: `prepare` returns the call, and `floor` is in bytes per element."""

    op: str
    name: str
    by: str  # "creche", "liger" or "eager"
    elements: int
    floor: float
    prepare: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Row:
    """What was counted for a case, in bytes per element."""

    op: str
    case: str
    by: str
    loaded: float
    stored: float
    bytes: float
    floor: float
    ratio: float


def measure(case: Case) -> Row:
    run = case.prepare()
    with counted() as traffic:
        run()
    loaded, stored = traffic.loaded / case.elements, traffic.stored / case.elements
    total = loaded + stored
    return Row(case.op, case.name, case.by, loaded, stored, total, case.floor, total / case.floor)


# --- Ops --------------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    yield from elementwise_cases(8192)
    for S, K in ((1, 2), (1, 4), (2, 0), (4, 0)):
        yield from ensemble_cases(S, K, V=32000, on_chip=False)
        yield from ensemble_cases(S, K, V=1000, on_chip=True)


def elementwise_cases(N: int) -> Iterator[Case]:
    D = 768
    x, residual, weight = random(N, D), random(N, D), random(D)
    ours = {
        "rms_norm": lambda x, weight: rms_norm.rms_norm(x, weight, 1e-6, None),
        "rms_norm_residual": lambda x, residual, weight: rms_norm.rms_norm(x, weight, 1e-6, residual),
        "rotary": rotary.rotary,
        "swiglu": swiglu.swiglu,
    }
    q, k, table = random(N // 64, 64, 12, 64), random(N // 64, 64, 4, 64), torch.randn(64, 32)
    inputs = {
        "rms_norm": ([x, weight], x.numel(), 4, 6),
        "rms_norm_residual": ([x, residual, weight], x.numel(), 8, 8),
        "rotary": ([q, k, table, table], q.numel() + k.numel(), 4, 4),
        "swiglu": ([x, residual], x.numel(), 6, 10),
    }
    for op, (tensors, elements, forward, backward) in inputs.items():
        for by in ("creche", "liger", "eager"):
            function = ours[op] if by == "creche" else partial(_by_peer, by, op)
            yield Case(op, "forward", by, elements, forward, lambda f=function, xs=tensors: partial(f, *xs))
            yield Case(op, "backward", by, elements, backward, partial(_backward, function, tensors))


def _by_peer(peer: str, op: str, *tensors: Any) -> Any:
    return getattr(eager if peer == "eager" else liger_on_the_interpreter(), op)(*tensors)


def _backward(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], object]:
    """Returns a call that computes the gradients of everything in 16 bits alone; the forward pass is run here."""
    leaves = [x.clone().requires_grad_() if x.dtype == torch.bfloat16 else x for x in tensors]
    with counted():  # for Liger's floats
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [torch.randn_like(y) for y in outputs]
    ends = [x for x in leaves if x.requires_grad]
    return lambda: torch.autograd.grad(outputs, ends, cotangents)


def ensemble_floor(S: int, K: int, form: str, divergence: str, on_chip: bool) -> float:
    """Returns the bytes of logits read and gradients written.

    Gradients of the Jensen-Shannon divergence need its value, and so one more pass.
    """
    R = S + K
    passes = 1 if on_chip else 2
    if form == "single":
        return BYTES * ((passes + (divergence == "jsd" and not on_chip)) * R + S)
    return BYTES * passes * R + BYTES * (R + S)  # "deferred": losses, and then gradients


def ensemble_cases(S: int, K: int, V: int, on_chip: bool) -> Iterator[Case]:
    N, R = 1, S + K
    logits = [random(N, V) for _ in range(R)]
    targets = torch.randint(V, (N,))

    def single(divergence: str) -> None:
        rows = torch.ones(N, dtype=torch.bool)
        gradients = [torch.empty_like(x) for x in logits[:S]]
        objective = LossSpec(targets, torch.ones(S), torch.ones(S, R), rows, rows, 1.0, divergence)
        ensemble_kl.loss_and_grad(logits, gradients, objective, V)

    def deferred(divergence: str) -> None:
        leaves = [x.requires_grad_() for x in (y.detach() for y in logits[:S])]
        with kernels.backend("triton"):
            ce, kl = ensemble_kl.ensemble_kl([*leaves, *logits[S:]], targets, S, 1.0, divergence, -100)
        torch.autograd.grad((ce, kl), leaves, (torch.ones_like(ce), torch.ones_like(kl)))

    def by_peer(peer: str) -> None:
        leaves = [x.requires_grad_() for x in (y.detach() for y in logits[:S])]
        total = _by_peer(peer, "ensemble_losses", [*leaves, *logits[S:]], targets, S)
        torch.autograd.grad(total, leaves)

    where = f"S={S} K={K} V={V}" + (" on chip" if on_chip else "")
    for divergence in ("forward", "reverse", "jsd"):
        for form, run in (("single", single), ("deferred", deferred)):
            floor = ensemble_floor(S, K, form, divergence, on_chip)
            name = f"{form} {divergence} {where}"
            yield Case("ensemble_kl", name, "creche", N * V, floor, lambda run=run, d=divergence: partial(run, d))
    if not on_chip:
        floor = ensemble_floor(S, K, "single", "forward", on_chip=True)
        for peer in ("liger", "eager"):
            yield Case("ensemble_kl", f"forward {where}", peer, N * V, floor, lambda p=peer: partial(by_peer, p))


@cache
def liger_on_the_interpreter() -> Any:
    """Returns Liger's peers with Triton's `rsqrt`, as the interpreter has no libdevice."""
    from liger_kernel.ops import fused_add_rms_norm
    from liger_kernel.ops import rms_norm as liger_rms_norm

    from benchmarks.peers import liger

    for module in (fused_add_rms_norm, liger_rms_norm):
        vars(module)["rsqrt"] = lambda x: tl.rsqrt(x)
    return liger


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Count the bytes that each op moves, without a GPU.")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose 'op case by' it matches")
    parser.add_argument("--csv", metavar="FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(f"{'bytes per element':>56} {'loaded':>8} {'stored':>8} {'both':>8} {'floor':>6} {'ratio':>7}")
    rows = []
    for case in cases():
        if re.search(options.only, f"{case.op} {case.name} {case.by}"):
            row = measure(case)
            rows.append(row)
            name = f"{row.op} {row.case} {row.by}"
            print(f"{name:>56} {row.loaded:8.2f} {row.stored:8.2f} {row.bytes:8.2f} {row.floor:6.1f} {row.ratio:7.3f}")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([column.name for column in fields(Row)])
            writer.writerows(astuple(row) for row in rows)


if __name__ == "__main__":
    main(sys.argv[1:])
