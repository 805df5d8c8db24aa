"""Traces of chosen steps: a trace of every rank for Perfetto, and its top operations.

runs/<name>/profile/
    rank-<r>.json.gz                opens in ui.perfetto.dev as it is
    rank-<r>.txt                    the operations that took longest
    out-of-memory-rank-<r>.pickle   what a GPU's memory held when it ran out; opens in pytorch.org/memory_viz
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from engine.data.batches import Step
from engine.system.distributed import Runtime
from engine.system.private_api import write_snapshot_when_out_of_memory

TOP = 40  # operations in a table


def profiled(steps: Iterator[Step], chosen: tuple[int, int] | None, folder: Path, runtime: Runtime) -> Iterator[Step]:
    """Yields the steps as they are, and traces those from the first to the last `chosen`.

    A step's trace ends where the next step is asked for or the run stops. Where a GPU's memory runs out, a snapshot of
    what it holds is always written.
    """
    if runtime.device.type == "cuda":
        write_snapshot_when_out_of_memory(folder / f"out-of-memory-rank-{runtime.rank}.pickle")
    first, last = chosen or (0, -1)
    profiler: profile | None = None
    try:
        for step in steps:
            if first <= step.number <= last and profiler is None:
                profiler = profile(record_shapes=True, with_flops=True)
                profiler.start()
            with nullcontext() if profiler is None else record_function(f"step {step.number}"):
                yield step
            if step.number == last and profiler is not None:
                finished, profiler = profiler, None
                with runtime.raise_on_all_ranks():
                    _finish(finished, folder, runtime)
    finally:
        if profiler is not None:  # The run stops, perhaps on this rank alone.
            _finish(profiler, folder, runtime)


def top_operations(finished: profile) -> str:
    """Returns torch's tables of what took longest by its own time, on the CPU and, where there is one, on the GPU.

    FLOPs stand beside the operations whose FLOPs torch knows.
    """
    averages = finished.key_averages()
    columns = ["self_cpu_time_total"]
    if any(event.self_device_time_total for event in averages):
        columns.insert(0, "self_device_time_total")
    tables = (averages.table(sort_by=column, row_limit=TOP, max_name_column_width=60) for column in columns)
    return "\n\n".join(tables) + "\n"


def _finish(profiler: profile, folder: Path, runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    profiler.stop()
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"rank-{runtime.rank}.json.gz"))
    (folder / f"rank-{runtime.rank}.txt").write_text(top_operations(profiler), encoding="utf-8")
