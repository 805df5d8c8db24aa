"""The process group of a run's ranks, the device and the threads of each rank, and how a rank's process ends."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import deepspeed
import torch
import torch.distributed as dist

from engine.system.errors import OtherRankError, UserError, disk_refuses
from engine.system.private_api import (
    add_to_shared_counter,
    process_groups,
    run_exit_functions,
    skip_shared_memory_build,
)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt, from malloc.h
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # the longest that ranks wait while rank 0 prepares a large text

Value = TypeVar("Value")


@dataclass(frozen=True)
class Runtime:
    """This process's place among the ranks of a run, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: torch.Tensor) -> list[float]:
        """Returns the sum over all ranks of a small 1-d float tensor, as numbers.

        It costs one collective and one wait for the device. `values` is overwritten.
        """
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: Value) -> Value:
        """Returns rank 0's `value` on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Returns every rank's `value`, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Runs the block on rank 0 before the other ranks run it. If rank 0 fails, no other rank begins.

        Where rank 0 met a UserError, or a disk that refuses, all ranks raise UserError. After any other exception of
        rank 0 the others raise OtherRankError.
        """
        failure: Exception | None = None
        try:
            if self.is_main_process:
                yield
        except BaseException as error:
            failure = _as_user_error(error) or OtherRankError(f"rank 0: {error or type(error).__name__}")
            if isinstance(failure, UserError) and failure is not error:
                raise failure from error
            raise
        finally:
            failure = self.broadcast(failure)
        if not self.is_main_process:
            if failure is not None:
                raise failure
            yield

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Runs the block on every rank, and waits at its end for the others.

        Where a UserError, or a disk that refuses, ends the block on one rank, all raise a UserError that names it.
        """
        failure: str | None = None
        try:
            yield
        except Exception as error:
            if _as_user_error(error) is None:
                raise
            failure = str(error) if self.world_size == 1 else f"rank {self.rank}: {error}"
        failures = [message for message in self.all_gather(failure) if message is not None]
        if failures:
            raise UserError(failures[0])


def _as_user_error(error: BaseException) -> UserError | None:
    if isinstance(error, UserError):
        return error
    return UserError(str(error)) if disk_refuses(error) else None


def keep_freed_memory() -> None:
    """Has glibc keep the memory that is freed; it does nothing on other systems than Linux.

    By default glibc returns the memory of every large tensor to the system and gets it back page by page, zeroed. On a
    CPU that costs more than most of what is computed in it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def init_distributed() -> Runtime:
    """Joins the run's process group: the launcher's, or a group of one where plain Python runs a recipe.

    Each rank takes its share of the node's cores, unless OMP_NUM_THREADS is set; by default every rank would start one
    thread per core.
    """
    keep_freed_memory()
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)  # Port 0 is any that is free.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    skip_shared_memory_build()
    if not dist.is_initialized():
        deepspeed.init_distributed(
            "nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=COLLECTIVE_TIMEOUT,
        )
    runtime = Runtime(dist.get_rank(), dist.get_world_size(), local_rank, device)
    runtime.barrier()  # Rank 0 keeps the addresses: if a rank ended at once, those still connecting would be cut off.
    return runtime


def leave() -> None:
    """Leaves the process group. Call it only where all ranks did well: after a failure others may wait elsewhere."""
    for group in process_groups():
        dist.barrier(group)  # It waits for all that was begun before: ZeRO 3 leaves gathers that nobody waits for.
    dist.destroy_process_group()


def exit_process(code: int = 0) -> NoReturn:
    """Ends this process. A rank among several under gloo ends without taking the interpreter down.

    gloo's threads release a collective's tensors some time after it is done, and for that they take the interpreter's
    lock. A thread that waits for the lock while the interpreter goes down is unwound through noexcept code, and the
    process aborts. DeepSpeed keeps its process groups, and so these threads, to the end.
    """
    joined = dist.is_initialized()
    has_gloo_threads = joined and dist.get_world_size() > 1 and dist.get_backend() == dist.Backend.GLOO
    if joined and code == 0:
        leave()
    if not has_gloo_threads:
        sys.exit(code)
    run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first_to_fail() -> bool:
    """Returns whether no other rank has asked this before; before the ranks have met, whether this is rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return os.environ.get("RANK", "0") == "0"
    try:
        return add_to_shared_counter("creche/failed") == 1
    except RuntimeError:  # Rank 0, which keeps the count, has ended: it has asked before.
        return False
