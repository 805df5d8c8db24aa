"""How a run learns that it should stop: by a signal, or because its launcher is gone."""

import re
import signal
from types import FrameType

import psutil


class StopSignal:
    """True once this rank was asked to stop: by SIGTERM or SIGUSR1, or because its launcher is gone.

    It is only a wish. At the end of a step the ranks share their wishes, so that all of them save the same step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._launchers = _launchers()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked or not all(map(_is_alive, self._launchers))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _launchers() -> list[psutil.Process]:
    """Returns the launcher processes above this one; none where a shell started it, which may end before the run.

    DeepSpeed has two: a runner, and below it the launcher of this node, which does not notice when the runner is
    killed.
    """
    launchers = []
    for process in psutil.Process().parents():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            break
        # A script that was started by its first line gives the process its own name; otherwise the name is Python's.
        is_python = re.search("python|deepspeed|torchrun", process.name())
        if not is_python or not re.search(r"deepspeed|torchrun|torch\.distributed", command):
            break
        launchers.append(process)
    return launchers
