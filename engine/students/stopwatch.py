"""How long one model's own work takes, on a CPU or a GPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stopwatch:
    """Adds up seconds: on a GPU between two events on its stream, on a CPU by the wall clock."""

    device: torch.device
    _wall_seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time of the block."""
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._wall_seconds += time.perf_counter() - begin

    def take(self) -> float:
        """Returns the seconds since the last call. On a GPU it waits for the events."""
        seconds = self._wall_seconds
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self._wall_seconds, self._events = 0.0, []
        return seconds
