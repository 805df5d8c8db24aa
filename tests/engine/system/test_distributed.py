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

ROOT = Path(__file__).parents[2]
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
place = runtime.start()
others = [torch.zeros(1000) for _ in range(2)]
group = dist.new_group([0, 1])  # as DeepSpeed makes: destroying the process group waits for the first one alone
if place.rank == 1:
    time.sleep(2)
begun = dist.all_gather(others, torch.ones(1000), group=group, async_op=True)
runtime.leave()
assert all(other.min() == 1 for other in others), "a collective was left in flight"
assert begun.is_success()
assert not dist.is_initialized()
os._exit(0)  # as end() would, had the group not been left
"""


def test_nobody_leaves_while_a_collective_is_in_flight(spawn_ranks: Callable[..., None], tmp_path: Path) -> None:
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    spawn_ranks(script, 2)


SHARING = """
import pytest
from engine.system import distributed as runtime
place = runtime.start()
assert place.broadcast(f"from {place.rank}") == "from 0"
for block in (place.main_first, place.together):
    with block():
        pass
with pytest.raises(ValueError, match="^.*Is a directory: '/'$"), place.main_first():
    assert place.is_main, "no other rank begins"
    open("/")
for rank in range(2):
    with pytest.raises(ValueError, match=f"^rank {rank}: .*Is a directory: '/'$"), place.together():
        if place.rank == rank:
            open("/")
place.barrier()
runtime.end()
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
runtime.start()
assert connected.exists(), "began before the other had connected"
runtime.end()
"""


def test_nobody_begins_before_all_have_met(spawn_ranks: Callable[..., None], tmp_path: Path) -> None:
    """One that failed at once would cut off those still connecting."""
    script = tmp_path / "meeting.py"
    script.write_text(MEETING)
    spawn_ranks(script, 2, tmp_path)


FAILING = """
import sys
from engine.system import distributed as runtime
from engine.system.errors import user_errors
folder, fail = sys.argv[1:]
place = runtime.start()
sys.stderr = open(f"{folder}/{place.rank}", "w")
with user_errors():
    if str(place.rank) in fail:
        raise ValueError("mend it")
    place.barrier()
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
from engine.system.errors import user_errors
folder, code = Path(sys.argv[1]), int(sys.argv[2])
place = runtime.start()
store = dist.PrefixStore("own", dist.distributed_c10d._get_default_store())
own = dist.ProcessGroupGloo(store, place.rank, 2, timedelta(seconds=60))  # a group that leave() does not know
atexit.register((folder / f"exit-{place.rank}").touch)
sys.stdout = open(folder / f"said-{place.rank}", "w")
print("all of it")
place.barrier()
if place.is_main:
    own.allreduce([torch.ones(1000)])
else:
    time.sleep(0.2)
    with contextlib.suppress(RuntimeError):  # on a busy machine rank 0 is gone by now
        own.allreduce([torch.ones(1000)]).wait()
runtime.dist.barrier = lambda group: None  # rank 0 ends meanwhile
with user_errors():
    if code == 2:
        raise ValueError("mend it")
    runtime.end()
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


@pytest.mark.parametrize(("world", "backend"), [(1, "gloo"), (2, "nccl")])
def test_a_process_without_that_danger_ends_as_python_does(
    world_size: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: pytest.fail("not as Python does"))
    with pytest.raises(SystemExit) as ended:
        runtime.end(2)
    assert ended.value.code == 2
