"""What happens inside chosen steps: a trace of every rank for Perfetto, its top operations, snapshots of GPU memory.

runs/<name>/profile/
    rank-<r>.json.gz         opens in ui.perfetto.dev as it is
    rank-<r>.txt             the operations that took longest
    memory-rank-<r>.pickle   opens in pytorch.org/memory_viz; out-of-memory-rank-<r>.pickle likewise
"""

import math
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from engine.data.batches import Step
from engine.system.distributed import Runtime
from engine.system.formatting import format_count

TOP = 40
_BYTES = {
    "float": 4,
    "double": 8,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "long int": 8,
    "long": 8,
    "int": 4,
    "short": 2,
    "bool": 1,
    "unsigned char": 1,
    "signed char": 1,
}


def profiled(
    steps: Iterator[Step], chosen: tuple[int, int] | None, folder: Path, runtime: Runtime, *, memory: bool
) -> Iterator[Step]:
    """The steps as they are; those from the first to the last `chosen` are traced, each until the next is asked for or
    the run stops.

    `memory`: also what a GPU's memory was given for meanwhile. Where a GPU's runs out, what holds it is always written.
    """
    if runtime.device.type == "cuda":
        attach: Any = vars(torch._C)["_cuda_attach_out_of_memory_observer"]  # no stub has it
        attach(lambda *_: _snapshot(folder / f"out-of-{_name(runtime)}"))
    first, last = chosen or (0, -1)
    running: profile | None = None
    try:
        for step in steps:
            if first <= step.number <= last and running is None:
                running = _begin(runtime, memory=memory)
            with nullcontext() if running is None else record_function(f"step {step.number}"):
                yield step
            if step.number == last and running is not None:
                finished, running = running, None
                with runtime.raise_on_all_ranks():
                    _finish(finished, folder, runtime, memory=memory)
    finally:
        if running is not None:  # the run stops, perhaps on this rank alone
            _finish(running, folder, runtime, memory=memory)


def _name(runtime: Runtime) -> str:
    return f"memory-rank-{runtime.rank}.pickle"


def _snapshot(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(torch.cuda.memory._snapshot()))


def _begin(runtime: Runtime, *, memory: bool) -> profile:
    activities = [ProfilerActivity.CPU]
    if runtime.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        if memory:
            torch.cuda.memory._record_memory_history()
    running = profile(activities=activities, record_shapes=True, with_flops=True)
    running.start()
    return running


def _finish(running: profile, folder: Path, runtime: Runtime, *, memory: bool) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    running.stop()
    folder.mkdir(parents=True, exist_ok=True)
    running.export_chrome_trace(str(folder / f"rank-{runtime.rank}.json.gz"))
    (folder / f"rank-{runtime.rank}.txt").write_text(top_operations(running))
    if memory and runtime.device.type == "cuda":
        _snapshot(folder / _name(runtime))
        torch.cuda.memory._record_memory_history(enabled=None)


def top_operations(finished: profile) -> str:
    """Tables of what took longest by its own time: operations and, where there is a GPU, its kernels. FLOPs where torch
    knows them; of bytes, those of the tensors that an operation was given (what it writes is not among them)."""
    averages = [event for event in finished.key_averages() if event.count]
    operations = [event for event in averages if event.device_type == DeviceType.CPU]
    kernels = [event for event in averages if event.device_type != DeviceType.CPU]
    given: dict[str, int] = defaultdict(int)
    results = finished.profiler.kineto_results if finished.profiler is not None else None
    for event in results.events() if results is not None else ():
        given[event.name()] += sum(
            math.prod(shape) * _BYTES.get(dtype, 0)
            for shape, dtype in zip(event.shapes(), event.dtypes(), strict=False)
        )
    tables = [_table("operation", operations, lambda event: event.self_cpu_time_total, given)]
    if kernels:
        tables = [
            _table("operation, its time on the GPU", operations, lambda event: event.self_device_time_total, given),
            _table("kernel", kernels, lambda event: event.self_device_time_total, given),
            *tables,
        ]
    return "\n".join(tables)


def _table(title: str, events: list[Any], own: Callable[[Any], float], given: Mapping[str, int]) -> str:
    total = sum(map(own, events)) or 1.0
    rows = [(title, "calls", "ms", "share", "FLOPs", "bytes given")]
    rows += [
        (
            event.key[:60],
            f"{event.count:,}",
            f"{own(event) / 1000:.3f}",
            f"{own(event) / total:.1%}",
            format_count(event.flops) if event.flops else "-",
            format_count(given[event.key]) if given[event.key] else "-",
        )
        for event in sorted(events, key=own, reverse=True)[:TOP]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "\n".join(lines) + "\n"
