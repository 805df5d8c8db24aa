"""Where the time of a step goes: phases within phases, and collectives."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks import gate
from benchmarks.gate import REST, Phases


class Clock:
    """Time passes only when something takes it."""

    now = 0.0

    def take(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gate, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_a_phase_within_another_counts_for_itself_alone(clock: Clock):
    phases = Phases()
    inner = phases.wrapped(lambda: clock.take(20), "loss")

    def outer() -> None:
        clock.take(10)
        inner()

    phases.wrapped(outer, "backward")()
    assert phases.finish(clock.now) == ({}, 0), "nobody asked"
    phases.begin(clock.now)
    phases.wrapped(outer, "backward")()
    inner()
    clock.take(5)
    seconds, _ = phases.finish(clock.now)
    assert (seconds["loss"], seconds["backward"], seconds[REST]) == (40, 10, 5)
    assert phases.finish(clock.now) == ({}, 0), "for one step"


def test_a_collective_waits_for_the_last_rank_and_is_counted(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    called = []

    class Work:
        def wait(self) -> None:
            clock.take(10)
            called.append("arrived")

    def all_gather(whole: torch.Tensor, part: torch.Tensor, group: object = None, async_op: bool = False) -> object:
        called.append("begun")
        return Work() if async_op else None

    monkeypatch.setattr(dist, "barrier", lambda group: (called.append(f"all of {group} are here"), clock.take(20)))
    phases = Phases()
    collective = phases.collective(all_gather)
    collective(torch.ones(8), torch.ones(4), group="two", async_op=True)
    assert called == ["begun"], "as it is where nothing is measured"
    called.clear()
    phases.begin(clock.now)
    collective(torch.ones(8), torch.ones(4), group="two", async_op=True)
    collective(torch.ones(8), torch.ones(4), group="two")
    seconds, moved = phases.finish(clock.now)
    assert called == ["all of two are here", "begun", "arrived", "all of two are here", "begun"]
    assert moved == 2 * 32
    assert (seconds["waiting"], seconds["communication"]) == (40, 10)
