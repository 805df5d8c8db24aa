"""Audits what every Triton kernel compiles to, and predicts its time, without a GPU.

    python benchmarks/audit.py [--only REGEX] [--targets cuda:90 hip:gfx942] [--processes 2] [--csv FILE]

Each launcher is called as in training, but on tensors of the "meta" device, and its launches are stopped after Triton
has compiled them. So the signature, the constants and the divisibility of every argument are those which the JIT would
choose. Liger's kernels for the same work stand in the next row.

What is counted, and where:
    registers, spills, stack, shared memory     in the machine code, by cuobjdump or from AMD's metadata. Spills of
                                                scalars on AMD have a column of their own: the compiler moves them to
                                                lanes of a vector register, which needs no memory.
    load and store width                        in PTX or AMD assembly, of the narrowest access to rows
    bytes, exponentials per element             in Triton's IR, for one program whose loop runs once per tile of its
                                                row. Every access counts, though a cache may hold a row in a later
                                                pass, or a weight that all programs read.

The predicted time is the largest of four lower bounds, and named after it:
    bandwidth   bytes over 0.9 of the peak, which is what a copy reaches
    ex2         exponentials, logarithms, reciprocals and roots, 16 a clock and processor
    issue       arithmetic of the IR, before multiply-adds are fused, one operation a clock and lane
    latency     Little's law: what resident programs have under way in one iteration arrives after LATENCY

Shapes: N tokens, D hidden, V vocabulary, S students, K teachers, R = S + K streams.
"""

import argparse
import csv
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, fields
from functools import cache, partial
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import launch
from kernels.ops.ensemble_kl import triton as ensemble_kl
from kernels.ops.rms_norm import triton as rms_norm
from kernels.ops.rotary import triton as rotary
from kernels.ops.swiglu import triton as swiglu

N = 8192
STREAMS = ((1, 1), (1, 2), (1, 4), (2, 0), (3, 0), (4, 0), (2, 2), (8, 0))  # (S, K)
APART = ("losses", "gradients")  # launches of their own
LATENCY = 0.8e-6  # seconds from a read to its data with the memory busy; an estimate, the same for all chips


@dataclass(frozen=True)
class Chip:
    """The limits of a GPU, from the makers' data sheets and tuning guides; a processor is NVIDIA's SM or AMD's CU."""

    name: str
    target: GPUTarget
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    lanes: int  # fp32 operations per clock and processor
    registers: int  # of 32 bits, per processor
    shared: int  # bytes per processor
    threads: int = 2048


CHIPS = {
    "cuda:80": Chip("A100", GPUTarget("cuda", 80, 32), 108, 1.41e9, 2.04e12, 64, 65536, 164 << 10),
    "cuda:90": Chip("H100", GPUTarget("cuda", 90, 32), 132, 1.76e9, 3.35e12, 128, 65536, 228 << 10),
    "cuda:100": Chip("B200", GPUTarget("cuda", 100, 32), 148, 1.85e9, 8.0e12, 128, 65536, 228 << 10),
    "hip:gfx942": Chip("MI300X", GPUTarget("hip", "gfx942", 64), 304, 2.1e9, 5.3e12, 128, 131072, 64 << 10),
}


@dataclass(frozen=True)
class Case:
    """One launch on N tokens. Its bytes and exponentials are given per element of x, of q and k, or of [N, V]."""

    op: str
    name: str
    by: str  # "creche" or "liger"
    elements: int
    launch: Callable[[Chip], object]
    taken: float = 1.0  # share of the tiles' elements that masks let through


@dataclass(frozen=True)
class Row:
    """One compiled kernel. Widths in bits, 0 where no row is loaded or stored; shared memory and stack in bytes."""

    op: str
    case: str
    by: str
    target: str
    warps: int
    registers: int
    spills: int
    moved_scalars: int
    stack: int
    shared: int
    load_bits: int
    store_bits: int
    exponentials: float
    bytes: float
    occupancy: float
    chip: str
    milliseconds: float
    limit: str


# --- The kernels ------------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    return [*elementwise_cases(), *ensemble_cases()]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def elementwise_cases() -> Iterator[Case]:
    D, H, H_kv, D_head, width, L = 768, 12, 4, 64, 2048, 1024
    x, weight = meta(N, D), meta(D)
    yield from (
        Case("rms_norm", "forward", "creche", N * D, lambda _: rms_norm.run_forward(x, weight, 1e-6, None)),
        Case("rms_norm", "forward", "liger", N * D, lambda _: _liger("rms_norm").rms_norm_forward(
            x, weight, 1e-6, 0.0, "llama", None)),
        Case("rms_norm", "backward", "creche", N * D, lambda _: rms_norm.run_backward(x, x, weight, 1e-6, None, True)),
        Case("rms_norm", "backward", "liger", N * D, lambda _: _liger("rms_norm").rms_norm_backward(
            x, x, weight, meta(N, dtype=torch.float32), 0.0, 0, 1024, 4, False, None)),
        Case("rms_norm", "residual forward", "creche", N * D, lambda _: rms_norm.run_forward(x, weight, 1e-6, x)),
        Case("rms_norm", "residual forward", "liger", N * D, lambda _: _liger(
            "fused_add_rms_norm").fused_add_rms_norm_forward(x, x, weight, 1e-6, 0.0, "llama")),
        Case("rms_norm", "residual backward", "creche", N * D, lambda _: rms_norm.run_backward(
            x, x, weight, 1e-6, x, True)),
        Case("rms_norm", "residual backward", "liger", N * D, lambda _: _liger(
            "fused_add_rms_norm").fused_add_rms_norm_backward(
            x, x, x, weight, meta(N, dtype=torch.float32), 0.0, 0, 1024, 4, 2, False)),
    )  # fmt: skip
    q, k, table = meta(N // L, L, H, D_head), meta(N // L, L, H_kv, D_head), meta(L, D_head // 2, dtype=torch.float32)
    elements = N * (H + H_kv) * D_head
    yield Case("rotary", "forward", "creche", elements, lambda _: rotary.run(q, k, table, table, False), taken=0.5)
    yield Case("rotary", "forward", "liger", elements, lambda _: _liger("rope").rope_forward(
        q.transpose(1, 2), k.transpose(1, 2), table.repeat(1, 2), table.repeat(1, 2)))  # fmt: skip
    gate = meta(N, width)
    yield from (
        Case("swiglu", "forward", "creche", N * width, lambda _: swiglu.swiglu(gate, gate)),
        Case("swiglu", "forward", "liger", N * width, lambda _: _liger("swiglu").swiglu_forward(gate, gate)),
        Case("swiglu", "backward", "creche", N * width, lambda _: swiglu.run_backward(gate, gate, gate)),
        Case("swiglu", "backward", "liger", N * width, lambda _: _liger("swiglu").swiglu_backward(gate, gate, gate)),
    )


def ensemble_cases() -> Iterator[Case]:
    for V in (16000, 32000):
        for divergence in ("forward", "reverse", "jsd"):
            for S, K in STREAMS:
                for form in (*APART, "single") if S <= launch.STUDENTS_AT_ONCE else APART:
                    yield Case(
                        "ensemble_kl", f"{form} {divergence} S={S} K={K} V={V} bf16", "creche", N * V,
                        partial(_launch_ensemble, S, K, V, V, form, divergence, torch.bfloat16),
                    )  # fmt: skip
        yield from _liger_losses(V)
    for V in (16000, 32000, 50257):
        for S, K in STREAMS:
            for form in ("single",) if S <= launch.STUDENTS_AT_ONCE else APART:
                yield Case(
                    "linear_ensemble_kl", f"{form} forward S={S} K={K} V={V} fp32", "creche", N * V,
                    partial(_launch_ensemble, S, K, V, -(-V // 64) * 64, form, "forward", torch.float32),
                )  # fmt: skip


def _launch_ensemble(
    S: int, K: int, V: int, width: int, form: str, divergence: str, dtype: torch.dtype, chip: Chip
) -> None:
    R, fp32 = S + K, torch.float32
    logits, rows = [meta(N, width, dtype=dtype) for _ in range(R)], meta(N, dtype=torch.bool)
    ce, kl = meta(S, N, dtype=fp32), meta(S, R, N, dtype=fp32)
    ensemble_kl.run(
        logits,
        students=S,
        targets=meta(N, dtype=torch.int64),
        ce_rows=rows,
        kl_rows=rows,
        losses=None if form == "gradients" else (ce, kl),
        saved=None if form == "single" else (meta(2 * R + S, N, dtype=fp32), meta(S, R, N, dtype=fp32)),
        gradients=None if form == "losses" else logits[:S],
        weights=(None, None) if form == "losses" else (ce, kl),
        vocabulary=V,
        temperature=2.0,
        divergence=divergence,
        gpu=ensemble_kl.Gpu(chip.target.warp_size, chip.target.backend == "cuda" and int(chip.target.arch) >= 100),
    )


def _liger_losses(V: int) -> Iterator[Case]:
    """Yields Liger's losses of one student and one teacher: cross-entropy on logits, and divergences.

    The divergences take log-probabilities that are made elsewhere.
    """
    logs, losses = meta(N, V, dtype=torch.float32), meta(N, dtype=torch.float32)

    def cross_entropy(chip: Chip) -> None:
        module, logits = _liger("cross_entropy"), meta(N, V)
        names = module.liger_cross_entropy_kernel.arg_names
        arguments = dict.fromkeys(names) | dict.fromkeys(
            (name for name in names if name.startswith(("RETURN", "HAS"))), False
        )
        arguments |= dict.fromkeys((name for name in names if name.endswith("_stride")), 1)
        warps = 16 if chip.name == "MI300X" else 8 if chip.name == "B200" else 32  # Liger's rule for 16 bits
        module.liger_cross_entropy_kernel[(N,)](**arguments | {
            "X_ptr": logits, "X_stride": V, "Y_ptr": meta(N, dtype=torch.int64), "loss_ptr": meta(N), "n_cols": V,
            "n_non_ignore": N, "sum_non_ignore_weight": N, "ignore_index": -100, "weight_sum": 0.0,
            "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean", "HAS_GRADIENTS": True,
            "BLOCK_SIZE": min(module.MAX_FUSED_SIZE, triton.next_power_of_2(V)), "num_warps": warps,
        })  # fmt: skip

    def kl_backward(chip: Chip) -> None:
        module = _liger("kl_div")
        block = min(module.MAX_FUSED_SIZE, triton.next_power_of_2(V))
        module._kldiv_kernel_backward[(N,)](
            logs, V, logs, V, V, BLOCK_SIZE=block, num_warps=module.get_num_warps(block), log_target=True
        )

    def kl_forward(chip: Chip) -> None:
        _liger("kl_div").kldiv_forward_triton(logs, logs, True, "batchmean", 1e-10)

    def jsd(chip: Chip) -> None:
        from liger_kernel.ops.backends._triton.jsd import jsd_loss_and_grad_triton

        jsd_loss_and_grad_triton(logs, logs, None, 0.5, -100, float(N))

    for name, launcher in (("cross-entropy", cross_entropy), ("kl forward", kl_forward), ("kl backward", kl_backward),
                           ("jsd", jsd)):  # fmt: skip
        storage = "bf16" if launcher is cross_entropy else "fp32 log-probabilities"
        yield Case("ensemble_kl", f"{name} V={V} {storage}", "liger", losses.numel() * V, launcher)


@cache
def _liger(module: str) -> Any:
    import importlib

    return importlib.import_module(f"liger_kernel.ops.{module}")


# --- Compiling --------------------------------------------------------------------------------------------------------


@dataclass
class Offline:
    """A driver that has a target and no device."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # The JIT caches what it has compiled by device.

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def recorded_launches(chip: Chip) -> Iterator[list[tuple[int, Any]]]:
    """Yields a list of what is launched in the block, as (programs, kernel compiled for the chip); nothing runs."""
    launches: list[tuple[int, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((math.prod(grid), kernel))
        return kernel

    with mock.patch.object(JITFunction, "run", compile_only):
        driver.set_active(Offline(chip.target))  # type: ignore[arg-type]
        yield launches


def audit(case: Case, key: str) -> Row:
    """Returns the row of a case that is compiled for CHIPS[key]."""
    chip = CHIPS[key]
    with recorded_launches(chip) as launches:
        case.launch(chip)
    ((programs, kernel),) = launches
    if programs == 1:  # Liger takes one program for each processor of the device.
        programs = chip.processors
    threads = kernel.metadata.num_warps * chip.target.warp_size
    work = read_ir(kernel.asm["ttir"], case.elements / programs)
    code = read_cubin(kernel) if chip.target.backend == "cuda" else read_amd(kernel)
    widths = {
        kind: min((code.width(kind, access.place) for access in work.rows() if access.kind == kind), default=0)
        for kind in ("load", "store")
    }
    per_program = kernel.metadata.num_warps * chip.target.warp_size * -(-code.registers // 8) * 8
    resident = min(
        chip.threads // threads,
        chip.registers // per_program,
        chip.shared // max(kernel.metadata.shared, 1),
        32,
    )
    at_once = min(resident * chip.processors, programs)
    read, moved = case.taken * work.read, case.taken * (work.read + work.written)
    seconds = {
        "bandwidth": moved * programs / (0.9 * chip.bandwidth),
        "ex2": work.special * programs / (16 * chip.processors * chip.clock),
        "issue": work.operations * programs / (chip.lanes * chip.processors * chip.clock),
        "latency": read * programs / (at_once * case.taken * work.under_way / LATENCY),
    }
    limit = max(seconds, key=lambda name: seconds[name])
    elements = case.elements / programs
    return Row(
        op=case.op,
        case=case.name,
        by=case.by,
        target=key,
        warps=kernel.metadata.num_warps,
        registers=code.registers,
        spills=code.spills,
        moved_scalars=code.moved_scalars,
        stack=code.stack,
        shared=kernel.metadata.shared,
        load_bits=widths["load"],
        store_bits=widths["store"],
        exponentials=round(work.exponentials / elements, 2),
        bytes=round(moved / elements, 2),
        occupancy=round(resident * threads / chip.threads, 2),
        chip=chip.name,
        milliseconds=round(1e3 * seconds[limit], 4),
        limit=limit,
    )


# --- Triton's IR: what one program does -------------------------------------------------------------------------------

ACCESS = re.compile(r"tt\.(load|store) .*: tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>.*loc\((#loc\d*)\)")
ARITHMETIC = re.compile(r"= ((?:arith|math)\.(?:\w+f|select|exp2?|log2?|rsqrt|sqrt|erf|fma)) .*: .*?tensor<([\dx]+)x")
COUNTED_LOOP = re.compile(r"scf\.for %\w+ = %c(\d+)\w* to %c(\d+)\w* step %c(\d+)")
EXPONENTIALS = {"math.exp", "math.exp2"}
SPECIAL = EXPONENTIALS | {"math.log", "math.log2", "math.rsqrt", "math.sqrt", "arith.divf"}
Place = tuple[int, int]  # line and column of the source


@dataclass(frozen=True)
class Access:
    kind: str  # "load" or "store"
    place: Place
    elements: int
    dimensions: int


@dataclass
class Work:
    """The work of one program. `under_way` is the most bytes that it requests before it must wait for one."""

    read: float = 0.0
    written: float = 0.0
    exponentials: float = 0.0
    special: float = 0.0
    operations: float = 0.0
    under_way: float = 0.0
    accesses: list["Access"] = field(default_factory=list)

    def rows(self) -> list["Access"]:
        """Returns the accesses to rows: they have the largest one's dimensions, and at least an eighth of its size."""
        largest = max(self.accesses, key=lambda access: access.elements)
        return [
            access
            for access in self.accesses
            if access.dimensions == largest.dimensions and 8 * access.elements >= largest.elements
        ]

    def add(self, other: "Work", times: float = 1.0) -> None:
        for name in ("read", "written", "exponentials", "special", "operations"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.under_way = max(self.under_way, other.under_way)
        self.accesses += other.accesses


def read_ir(ttir: str, elements: float) -> Work:
    """Returns the work in Triton's IR, where `elements` are those of one program; a loop visits each tile once."""
    places = _places(ttir)
    lines = [line.strip() for line in ttir.splitlines() if not line.startswith("#loc")]
    tile = max(_size(match[2]) for line in lines if (match := ACCESS.search(line)))
    return _region(iter(lines), elements, elements / tile, False, places)[0]


def _region(
    lines: Iterator[str], elements: float, tiles: float, in_loop: bool, places: dict[str, Place]
) -> tuple[Work, bool]:
    """Returns the work up to the region's end, and whether an `else` follows."""
    work, under_way = Work(), 0.0
    for line in lines:
        if line.startswith("}"):
            work.under_way = max(work.under_way, under_way)
            return work, line.startswith("} else")
        if match := ACCESS.search(line):
            kind, count, bits = match[1], _size(match[2]), max(8, int(match[3]))
            if kind == "store" and re.search(r"tt\.store %\w+, %cst", line):
                continue  # These are the zeros of an ignored row.
            size = count * bits / 8 * (1.0 if in_loop else min(1.0, elements / count))
            if kind == "load":
                work.read, under_way = work.read + size, under_way + size
            else:
                work.written += size
            work.accesses.append(Access(kind, places[match[4]], count, match[2].count("x") + 1))
        elif match := ARITHMETIC.search(line):
            count = _size(match[2]) * (1.0 if in_loop else min(1.0, elements / _size(match[2])))
            work.operations += count
            work.special += count * (match[1] in SPECIAL)
            work.exponentials += count * (match[1] in EXPONENTIALS)
        elif line.endswith("({"):
            _region(lines, elements, tiles, in_loop, places)  # The region says how a reduction combines two numbers.
        elif "scf.if" in line:
            taken, other = _region(lines, elements, tiles, in_loop, places)
            if other:
                passed, _ = _region(lines, elements, tiles, in_loop, places)
                taken = max(taken, passed, key=lambda branch: branch.read)
            work.add(taken)
        elif line.endswith("{") or (line.startswith("scf.for") or "= scf.for" in line):
            loop = "scf.for" in line or "scf.while" in line
            inner, more = _region(lines, elements, tiles, in_loop or loop, places)
            while more:
                _, more = _region(lines, elements, tiles, in_loop, places)
            if match := COUNTED_LOOP.search(line):  # The loop is over the parts of a tile.
                first, end, step = (int(number) for number in match.groups())
                work.add(inner, -(-(end - first) // step))
            else:
                work.add(inner, tiles if loop and not in_loop else 1.0)
    work.under_way = max(work.under_way, under_way)
    return work, False


def _size(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


def _places(ttir: str) -> dict[str, Place]:
    """Returns the line and column by a location's name; where a call was inlined, those of the callee."""
    texts = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def resolve(name: str) -> Place:
        text = texts[name]
        if match := re.search(r'":(\d+):(\d+)$', text):
            return int(match[1]), int(match[2])
        inner = re.search(r"#loc\d*", text)
        return resolve(inner[0]) if inner else (0, 0)

    return {name: resolve(name) for name in texts}


# --- Machine code -----------------------------------------------------------------------------------------------------


@dataclass
class Code:
    registers: int
    spills: int
    moved_scalars: int
    stack: int
    widths: dict[tuple[str, Place], int]  # bits of the narrowest access, by its place in the source

    def width(self, kind: str, place: Place) -> int:
        """Returns the bits of the access at a place, or at the nearest one in its column.

        Triton 3.9 is some lines off in what it inlines.
        """
        line, column = place
        near = [other for k, other in self.widths if k == kind and other[1] == column and abs(other[0] - line) <= 5]
        if not near:
            raise RuntimeError(f"the assembly has no {kind} from line {line}; remove {knobs.cache.dir} and try again")
        return self.widths[kind, min(near, key=lambda other: abs(other[0] - line))]


def read_cubin(kernel: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [knobs.nvidia.cuobjdump.path, what, file.name]
            return subprocess.run(command, capture_output=True, check=True, text=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
        assert usage
        spills = 0  # Without a stack there are none, and disassembling takes longer than compiling.
        if int(usage[2]):
            spills = len(re.findall(r"\b(?:LDL|STL)\b", dump("--dump-sass")))
    ptx = re.compile(r"\b(ld|st)\.global[\w:.]*?(?:\.v(\d+))?\.b(\d+)\b|\b(cp)\.async\S* .*?0x([0-9a-f]+)")

    def width(match: re.Match[str]) -> tuple[str, int]:
        if match[4]:
            return "load", 8 * int(match[5], 16)
        return {"ld": "load", "st": "store"}[match[1]], int(match[2] or 1) * int(match[3])

    return Code(
        registers=int(usage[1]),
        spills=spills,
        moved_scalars=0,
        stack=int(usage[2]),
        widths=_widths(kernel.asm["ptx"], ptx, width),
    )


AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}


def read_amd(kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]

    access = re.compile(r"\b(?:global|buffer)_(load|store)_(?:lds_)?([a-z0-9]+)")
    return Code(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        moved_scalars=number("sgpr_spill_count"),
        stack=number("private_segment_fixed_size"),
        widths=_widths(text, access, lambda match: (match[1], AMD_BITS.get(match[2], 8))),
    )


def _widths(
    assembly: str, access: re.Pattern[str], width: Callable[[re.Match[str]], tuple[str, int]]
) -> dict[tuple[str, Place], int]:
    place, widths = (0, 0), {}
    for line in assembly.splitlines():
        if match := re.match(r"\s*\.loc\s+\d+\s+(\d+)\s+(\d+)", line):
            place = int(match[1]), int(match[2])
        elif match := access.search(line):
            kind, bits = width(match)
            widths[kind, place] = min(bits, widths.get((kind, place), bits))
    return widths


# --- The command ------------------------------------------------------------------------------------------------------


def _job(index: int, key: str) -> Row:
    return audit(cases()[index], key)


def run(only: str, targets: Iterable[str], processes: int, done: set[tuple[str, ...]]) -> Iterator[Row]:
    """Yields rows in the order of `cases`, each case for every target, without what is in `done`."""
    jobs = [
        (index, key)
        for index, case in enumerate(cases())
        for key in targets
        if re.search(only, f"{case.op} {case.name} {case.by}") and (case.op, case.name, case.by, key) not in done
    ]
    if processes == 1 or not jobs:
        yield from (_job(*job) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_job, *zip(*jobs, strict=True))


HEADINGS = ("op", "case", "by", "target", "warps", "regs", "spills", "scalars", "stack", "shared", "load", "store",
            "exp/el", "B/el", "occup.", "chip", "ms", "limit")  # fmt: skip
WIDTHS = (18, 42, 6, 10, 5, 4, 6, 7, 5, 6, 4, 5, 6, 6, 6, 6, 8, 9)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Audit the Triton kernels without a GPU.")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose 'op case by' it matches")
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--processes", type=int, default=1, help="compilers at once")
    parser.add_argument("--csv", metavar="FILE", help="gets every row as it is done; what it has is not done again")
    options = parser.parse_args(arguments)
    print(" ".join(f"{name:>{width}}" for name, width in zip(HEADINGS, WIDTHS, strict=True)))
    with open(options.csv or os.devnull, "a+", newline="") as file:
        file.seek(0)
        done = {(row["op"], row["case"], row["by"], row["target"]) for row in csv.DictReader(file)}
        writer = csv.writer(file)
        if not done:
            writer.writerow([column.name for column in fields(Row)])
        for row in run(options.only, options.targets, options.processes, done):
            print(" ".join(f"{value:>{width}}" for value, width in zip(astuple(row), WIDTHS, strict=True)), flush=True)
            writer.writerow(astuple(row))
            file.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
