"""Where the time of a step goes: phases within phases, and collectives."""

import time

import pytest
import torch
import torch.distributed as dist

from benchmarks.gate import REST, Phases


def test_a_phase_within_another_counts_for_itself_alone():
    phases = Phases()
    inner = phases.wrapped(lambda: time.sleep(0.02), "loss")

    def outer() -> None:
        time.sleep(0.01)
        inner()

    phases.wrapped(outer, "backward")()
    assert phases.finish() == ({}, 0), "nobody asked"
    phases.begin()
    phases.wrapped(outer, "backward")()
    inner()
    time.sleep(0.005)
    seconds, _ = phases.finish()
    assert 0.04 <= seconds["loss"] < 0.06
    assert 0.01 <= seconds["backward"] < 0.018
    assert 0.005 <= seconds[REST] < 0.01
    assert phases.finish() == ({}, 0), "for one step"


def test_a_collective_waits_for_the_last_rank_and_is_counted(monkeypatch: pytest.MonkeyPatch):
    called = []

    class Work:
        def wait(self) -> None:
            time.sleep(0.01)
            called.append("arrived")

    def all_gather(whole: torch.Tensor, part: torch.Tensor, group: object = None, async_op: bool = False) -> object:
        called.append("begun")
        return Work() if async_op else None

    monkeypatch.setattr(dist, "barrier", lambda group: (called.append(f"all of {group} are here"), time.sleep(0.02)))
    phases = Phases()
    collective = phases.collective(all_gather)
    collective(torch.ones(8), torch.ones(4), group="two", async_op=True)
    assert called == ["begun"], "as it is where nothing is measured"
    called.clear()
    phases.begin()
    collective(torch.ones(8), torch.ones(4), group="two", async_op=True)
    collective(torch.ones(8), torch.ones(4), group="two")
    seconds, moved = phases.finish()
    assert called == ["all of two are here", "begun", "arrived", "all of two are here", "begun"]
    assert moved == 2 * 32
    assert seconds["waiting"] >= 0.04
    assert 0.01 <= seconds["communication"] < 0.02
