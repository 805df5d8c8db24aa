"""How ranks meet and end, and how one learns that it should stop, or that another has failed."""

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from engine.system import distributed as runtime

ROOT = Path(__file__).parents[3]
RANK = """
import os, time
from engine.system.signals import StopSignal
stop = StopSignal()
print(os.getpid(), flush=True)
for _ in range(600):
    if stop:
        print("stops", flush=True)
        break
    time.sleep(0.05)
"""
# Each names a launcher in its command line, as DeepSpeed's two do.
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}, 'rank'])"
RUNNER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LAUNCHER!r}, 'deepspeed.launcher.launch'])"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "runner dies"])
def test_a_rank_hears_of_it(how: str) -> None:
    command = [sys.executable, "-c", RUNNER, "deepspeed"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as runner:
        assert runner.stdout is not None
        rank = int(runner.stdout.readline())
        if how == "runner dies":
            runner.kill()
        else:
            os.kill(rank, signal.Signals[how])
        assert runner.stdout.readline() == "stops\n"


def test_a_rank_without_a_launcher_outlives_the_shell_that_started_it() -> None:
    shell = LAUNCHER.replace("range(600)", "range(60)")
    with subprocess.Popen([sys.executable, "-c", shell], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        assert process.stdout.readline() == "", "it goes on to its end, and never stops"


LEAVING = """
import os, sys, time, torch
import torch.distributed as dist
from engine.system import distributed as runtime
ranks = runtime.init_distributed()
others = [torch.zeros(1000) for _ in range(2)]
group = dist.new_group([0, 1])  # as DeepSpeed makes: destroying the process group waits for the first one alone
if ranks.rank == 1:
    time.sleep(2)
begun = dist.all_gather(others, torch.ones(1000), group=group, async_op=True)
runtime.leave()
assert all(other.min() == 1 for other in others), "a collective was left in flight"
assert begun.is_success()
assert not dist.is_initialized()
os._exit(0)  # as exit_process() would, had the group not been left
"""


def test_nobody_leaves_while_a_collective_is_in_flight(spawn_ranks: Callable[..., None], tmp_path: Path) -> None:
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    spawn_ranks(script, 2)


SHARING = """
import errno
import pytest
from engine.system import distributed as runtime
from engine.system.errors import OtherRankError, UserError
ranks = runtime.init_distributed()
assert ranks.broadcast(f"from {ranks.rank}") == "from 0"
for block in (ranks.main_process_first, ranks.raise_on_all_ranks):
    with block():
        pass
full = OSError(errno.ENOSPC, "No space left on device", "runs")
for error, message in ((full, "No space left on device: 'runs'"), (UserError("mend it"), "mend it")):
    with pytest.raises(UserError, match=f"^[^:]*{message}$"), ranks.main_process_first():
        assert ranks.is_main_process, "no other rank begins"
        raise error
    for rank in range(2):
        with pytest.raises(UserError, match=f"^rank {rank}: [^:]*{message}$"), ranks.raise_on_all_ranks():
            if ranks.rank == rank:
                raise error
with pytest.raises(ValueError if ranks.is_main_process else OtherRankError, match="planted$"):
    with ranks.main_process_first():
        assert ranks.is_main_process, "no other rank begins"
        raise ValueError("planted")
ranks.barrier()
runtime.exit_process()
"""


def test_what_goes_wrong_on_one_rank_is_told_to_all(spawn_ranks: Callable[..., None], tmp_path: Path) -> None:
    script = tmp_path / "sharing.py"
    script.write_text(SHARING)
    spawn_ranks(script, 2)


MEETING = """
import sys, time
from pathlib import Path
import deepspeed
from engine.system import distributed as runtime
connected, join = Path(sys.argv[1]) / "connected", deepspeed.init_distributed
def late(*arguments, **options):
    join(*arguments, **options)
    if runtime.dist.get_rank() == 1:
        time.sleep(1)
        connected.touch()
deepspeed.init_distributed = late
runtime.init_distributed()
assert connected.exists(), "began before the other had connected"
runtime.exit_process()
"""


def test_nobody_begins_before_all_have_met(spawn_ranks: Callable[..., None], tmp_path: Path) -> None:
    """One that failed at once would cut off those still connecting."""
    script = tmp_path / "meeting.py"
    script.write_text(MEETING)
    spawn_ranks(script, 2, tmp_path)


FAILING = """
import sys
from engine.system import distributed as runtime
from engine.system.errors import UserError, report_errors
folder, fail = sys.argv[1:]
ranks = runtime.init_distributed()
sys.stderr = open(f"{folder}/{ranks.rank}", "w")
with report_errors():
    if str(ranks.rank) in fail:
        raise UserError("mend it")
    ranks.barrier()
"""


@pytest.mark.parametrize("fail", ["0", "1", "01"])
def test_one_rank_says_what_is_wrong(fail: str, spawn_ranks: Callable[..., None], tmp_path: Path) -> None:
    """Whichever has met it; the others, whose connection is lost by it, say nothing."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    spawn_ranks(script, 2, tmp_path, fail, code=2)
    assert sorted((tmp_path / rank).read_text() for rank in "01") == ["", "error: mend it\n"]


ENDING = """
import atexit, contextlib, ctypes, sys, time
from datetime import timedelta
from pathlib import Path
atexit.register(ctypes.PyDLL(None).usleep, 400_000)  # the last thing done, and with the interpreter's lock
import torch, torch.distributed as dist
from engine.system import distributed as runtime
from engine.system.errors import UserError, report_errors
folder, code = Path(sys.argv[1]), int(sys.argv[2])
ranks = runtime.init_distributed()
store = dist.PrefixStore("unknown", dist.distributed_c10d._get_default_store())
unknown = dist.ProcessGroupGloo(store, ranks.rank, 2, timedelta(seconds=60))  # a group that leave() does not know
atexit.register((folder / f"exit-{ranks.rank}").touch)
sys.stdout = open(folder / f"said-{ranks.rank}", "w")
print("all of it")
ranks.barrier()
if ranks.is_main_process:
    unknown.allreduce([torch.ones(1000)])
else:
    time.sleep(0.2)
    with contextlib.suppress(RuntimeError):  # on a busy machine rank 0 is gone by now
        unknown.allreduce([torch.ones(1000)]).wait()
runtime.dist.barrier = lambda group: None  # rank 0 ends meanwhile
with report_errors():
    if code == 2:
        raise UserError("mend it")
    runtime.exit_process()
"""


@pytest.mark.parametrize("code", [0, 2])
def test_a_collective_that_is_done_while_a_rank_ends_does_not_abort_it(
    code: int, spawn_ranks: Callable[..., None], tmp_path: Path
) -> None:
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    spawn_ranks(script, 2, tmp_path, code, code=code)
    for rank in range(2):
        assert (tmp_path / f"exit-{rank}").exists(), "not all was done that was registered for the exit"
        assert (tmp_path / f"said-{rank}").read_text() == "all of it\n"


@pytest.mark.parametrize(("world_size", "backend"), [(1, "gloo"), (2, "nccl")])
def test_a_process_without_that_danger_ends_as_python_does(
    world_size: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: pytest.fail("not as Python does"))
    with pytest.raises(SystemExit) as ended:
        runtime.exit_process(2)
    assert ended.value.code == 2
