"""Every private name of Python, torch or DeepSpeed outside training, with what breaks when it changes.

What is public is called where it is needed. The private names that training depends on are in engine.students.zero.
The pins in pyproject.toml hold all of them still.
"""

import atexit
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def mark_size_as_changing(x: torch.Tensor, dimension: int) -> None:
    """Has torch.compile make one graph for all sizes of a dimension, where it can, instead of one graph per size.

    torch.compiler offers nothing like it. If `torch._dynamo.maybe_mark_dynamic` were gone, the first compiled forward
    pass that is given rows would fail (tests/engine/models/test_compiled.py).
    """
    torch._dynamo.maybe_mark_dynamic(x, dimension)  # pyright: ignore[reportAttributeAccessIssue]


def process_groups() -> list[dist.ProcessGroup]:
    """Returns every process group of this process, also those that DeepSpeed has made.

    torch.distributed lists none. If `distributed_c10d._world.pg_map` were gone, every run would fail at its end
    (tests/engine/system/test_distributed.py).
    """
    return list(distributed_c10d._world.pg_map)


def skip_shared_memory_build() -> None:
    """Keeps DeepSpeed from compiling its shared-memory all-reduce, half a minute for what only inference calls.

    If `deepspeed.ops.__compatible_ops__` were gone, every command would fail at its start.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_exit_functions() -> None:
    """Runs what was registered with atexit, as Python does first when it ends.

    If `atexit._run_exitfuncs` were gone, ranks under gloo would fail at their end.
    """
    atexit._run_exitfuncs()


def add_to_shared_counter(key: str) -> int:
    """Returns how many calls with this key the ranks have made together, this one included. It is no collective.

    torch.distributed has no public way to the store by which the ranks have met. If `_get_default_store` were gone,
    ranks that fail would end in another error (tests/engine/system/test_errors.py).
    """
    return distributed_c10d._get_default_store().add(key, 1)


def write_snapshot_when_out_of_memory(file: Path) -> None:
    """Has torch write what a GPU's memory holds where it runs out, for pytorch.org/memory_viz, before the error.

    If `_cuda_attach_out_of_memory_observer` were gone, no run would begin on a GPU; without `_dump_snapshot` another
    error would come where memory runs out.
    """

    def write(*_: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(file))

    attach: Any = vars(torch._C)["_cuda_attach_out_of_memory_observer"]  # The type checker does not know it.
    attach(write)
