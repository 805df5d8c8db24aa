"""One rank of the memory tests: the bytes of tensors at the peak of a training step, as findings of rank 0 in JSON.

Run by test_dry_run.py with RANK and its like set. What stands before the step is added up from the tensors that there
are; what the step allocates beyond it, from torch's own profile of its allocations.
"""

import gc
import json
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from engine.compute.memory import peak_memory
from engine.config.loading import build
from engine.config.settings import Config
from engine.data.batches import Step, TokenFile, TrainingData
from engine.models.families import shape_of
from engine.students.coefficients import LossWeighting
from engine.students.cohort import Cohort
from engine.students.gradients import accumulate
from engine.students.student import Student, student_model
from engine.system.distributed import Runtime, exit_process, init_distributed

VOCABULARY, LENGTH = 4000, 32
TRIES = 4  # of which the least counts: gloo's threads let go of what they have sent when they come to it ...
PAUSE = 0.02  # seconds, after each collective, in which they can
SHAPES = {
    "wide": {"layers": 1, "hidden": 192, "heads": 4, "ffn": 512},  # most of the memory is parameters'
    "deep": {"layers": 8, "hidden": 32, "heads": 4, "ffn": 128},  # what is kept of every token
}
CASES = [
    *(("wide", 1, micro_batches, stage) for micro_batches in (1, 2) for stage in range(4)),
    *(("deep", 16, 1, stage) for stage in (0, 3)),
]  # shape, sequences a rank takes at once, micro-batches, ZeRO stage


def settings(shape: str, batch: int, micro_batch: int, stage: int) -> Config:
    students = [{"name": name, "seed": i, "max_length": LENGTH, **SHAPES[shape]} for i, name in enumerate("ab")]
    train = {"steps": 9, "batch": batch, "micro_batch": micro_batch, "length": LENGTH, "zero_stage": stage}
    return build(Config, {"students": students, "train": train, "optimizer": {"warmup": 1}})


def unhurried(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        work = collective(*arguments, **options)
        time.sleep(PAUSE)
        return work

    return call


def tensors() -> list[torch.Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]


def standing(others: list[weakref.ref[torch.Tensor]]) -> int:
    """Bytes of all tensors, each storage once, but for those of other cases: DeepSpeed lets go of them late."""
    sizes = {(storage := tensor.untyped_storage()).data_ptr(): storage.nbytes() for tensor in tensors()}
    for other in others:
        if (tensor := other()) is not None:
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def peak(cohort: Cohort, config: Config, step: Step, runtime: Runtime, trace: Path) -> int:
    """Bytes beyond what stood before the step."""
    coefficients = LossWeighting(config.objective, len(cohort), runtime.device).coefficients()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tally = accumulate(cohort, step, coefficients)
        cohort.update(tally.losses_S, tally.ce_S, [0.0] * len(cohort), stop=False)
    profiled.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def measured(runtime: Runtime, folder: Path, shape: str, share: int, micro_batches: int, stage: int) -> Any:
    config = settings(shape, share * runtime.world_size, share // micro_batches, stage)
    train = config.train
    others = [weakref.ref(tensor) for tensor in tensors()]
    students = [Student(s, student_model(s, VOCABULARY), train, config.optimizer, runtime) for s in config.students]
    cohort = Cohort(students, runtime)
    data = TrainingData(
        TokenFile(folder / "tokens.bin", "uint16", LENGTH),
        batch=train.batch,
        micro_batch=train.micro_batch,
        seed=1,
        random_offsets=False,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    coefficients = LossWeighting(config.objective, len(cohort), runtime.device).coefficients()
    first, *then = data.steps(1, 1 + TRIES)
    tally = accumulate(cohort, first, coefficients)
    cohort.update(tally.losses_S, tally.ce_S, [0.0] * len(cohort), stop=False)
    del tally
    trace = folder / f"trace-{runtime.rank}.json"
    found = min(standing(others) + peak(cohort, config, step, runtime, trace) for step in then)
    shapes = {s.name: shape_of(s, VOCABULARY) for s in config.students}
    said = peak_memory(config, shapes, {}, share // micro_batches * LENGTH, runtime.world_size, stage)
    return {"found": found, "said": said}


def main() -> None:
    folder = Path(sys.argv[1])
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
        setattr(dist, name, unhurried(getattr(dist, name)))  # before DeepSpeed takes them
    runtime = init_distributed()
    gc.freeze()  # what was imported is not looked through again and again
    with runtime.main_process_first():
        if runtime.is_main_process:
            tokens = np.random.default_rng(0).integers(VOCABULARY, size=200 * LENGTH, dtype=np.uint16)
            tokens.tofile(folder / "tokens.bin")
    findings = {
        f"{shape}, {micro_batches} micro-batch(es), ZeRO {stage}": measured(
            runtime, folder, shape, sequences * micro_batches, micro_batches, stage
        )
        for shape, sequences, micro_batches, stage in CASES
    }
    if runtime.is_main_process:
        (folder / f"findings-{runtime.world_size}.json").write_text(json.dumps(findings))
    exit_process()


if __name__ == "__main__":
    main()
