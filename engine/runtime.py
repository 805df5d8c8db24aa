"""The process group, the device, threads, and how a run learns that it should stop."""

import atexit
import ctypes
import os
import platform
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import deepspeed
import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
PATIENCE = timedelta(hours=2)  # ranks wait for one another, at the longest while rank 0 prepares a large text

Value = TypeVar("Value")


@dataclass(frozen=True)
class Runtime:
    """This process's place among the ranks of a run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, values: torch.Tensor) -> list[float]:
        """The sum over ranks of a small float tensor, as numbers: one collective, one wait for the device."""
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def broadcast(self, value: Value) -> Value:
        """Rank 0's `value`, on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others. If it fails there, no other rank begins: all raise ValueError."""
        problem: str | None = None
        if not self.is_main:
            problem = self.broadcast(problem)
            if problem is not None:
                raise ValueError(problem)
            yield
            return
        try:
            yield
        except BaseException as error:
            problem = str(error) or type(error).__name__
            if isinstance(error, OSError):
                raise ValueError(problem) from error
            raise
        finally:
            self.broadcast(problem)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Every rank runs the block and waits at its end for the others. Where a ValueError or OSError ends it on one,
        all raise ValueError, which names that rank."""
        problem: str | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            if self.world == 1:
                raise ValueError(str(error)) from error
            problem = f"rank {self.rank}: {error}"
        if self.world > 1:
            problems: list[str | None] = [None] * self.world
            dist.all_gather_object(problems, problem)
            told = [problem for problem in problems if problem is not None]
            if told:
                raise ValueError(told[0])


def keep_freed_memory() -> None:
    """Let glibc keep what is freed. By default it returns every large tensor's memory to the system, and gets it back
    page by page, zeroed: on a CPU that costs more than most of what is computed in it. No effect elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def start() -> Runtime:
    """Join the run's process group: the launcher's, or a group of one where a recipe is run by plain python.

    Each of the ranks on a node takes its share of the cores, unless OMP_NUM_THREADS says otherwise; by themselves every
    one would start a thread for each core.
    """
    keep_freed_memory()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    # DeepSpeed would compile its shared-memory all-reduce first, half a minute for an operator only inference calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(
            "nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=PATIENCE,
        )
    place = Runtime(dist.get_rank(), dist.get_world_size(), local_rank, device)
    place.barrier()  # else a rank that ends at once cuts off those still connecting: rank 0 keeps their addresses
    return place


def leave() -> None:
    """Leave the process group, where all ranks did well; where one fails, others may be waiting elsewhere."""
    for group in list(distributed_c10d._world.pg_map):  # DeepSpeed makes some too
        dist.barrier(group)  # waits for all that was begun before it: ZeRO 3 leaves gathers that nobody waits for
    dist.destroy_process_group()


def end(code: int = 0) -> NoReturn:
    """End this process; where it is one of several ranks under gloo, without taking the interpreter down.

    gloo's threads let go of a collective's tensors some time after it is done, for which they take the interpreter's
    lock. One that waits for the lock while the interpreter goes down is unwound through noexcept code, and the process
    aborts. DeepSpeed keeps its groups, and so these threads, to the end.
    """
    joined = dist.is_initialized()
    has_threads = joined and dist.get_world_size() > 1 and dist.get_backend() == dist.Backend.GLOO
    if joined and code == 0:
        leave()
    if not has_threads:
        sys.exit(code)
    atexit._run_exitfuncs()  # what Python would do first
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first_to_fail() -> bool:
    """Whether no other rank has asked this before; before the ranks have met, whether this is rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return os.environ.get("RANK", "0") == "0"
    try:
        return distributed_c10d._get_default_store().add("creche/failed", 1) == 1
    except RuntimeError:  # rank 0, which keeps the count, is gone: it has asked
        return False


class StopSignal:
    """Whether this rank was asked to stop: by SIGTERM or SIGUSR1, or because its launcher is gone.

    Only a wish: the ranks agree on it at a step's end, so that all of them save the same step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._launchers = _launchers()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked or not all(map(_lives, self._launchers))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _launchers() -> list[psutil.Process]:
    """The launcher processes above this one; none where a shell started it, which may well end before the run.

    DeepSpeed's are two, a runner and below it the launcher of this node, and the second does not notice when the first
    is killed.
    """
    found = []
    for process in psutil.Process().parents():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            break
        # The name is the script's where a script was started by its first line, and else the interpreter's.
        by_python = re.search("python|deepspeed|torchrun", process.name())
        if not by_python or not re.search(r"deepspeed|torchrun|torch\.distributed", command):
            break
        found.append(process)
    return found


def device_name(device: torch.device) -> str:
    """What the run computed on, as its maker names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = (
        re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    )
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} threads a rank"


def git_commit() -> str:
    """The commit of the code that runs, with `+changes` where the tree differs from it; `unknown` outside git."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    finished = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return finished.stdout.strip()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
