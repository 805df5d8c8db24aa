"""One rank of the outer loop's tests with students in DeepSpeed engines; findings of rank 0 as JSON.

Run by test_outer_loop.py with RANK and its like set.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config.settings import OptimizerConfig, StudentConfig, TrainConfig
from engine.data.batches import TokenFile, TrainingData
from engine.models.llama import Llama
from engine.students.coefficients import LossCoefficients
from engine.students.cohort import Cohort
from engine.students.gradients import accumulate
from engine.students.hypergradient import inner_step_scale, parameters_of
from engine.students.outer_loop import OuterConfig, OuterLoop, OuterState
from engine.students.student import Student, new_model
from engine.system import distributed as runtime

V, LENGTH, BATCH, ALPHA = 31, 16, 8, 0.5
OPTIMIZER = OptimizerConfig(clip=1.5)
STUDENTS = [
    StudentConfig("a", 2, 32, 4, 48, kv_heads=2, learning_rate=3e-3, seed=1, max_length=LENGTH),
    StudentConfig("b", 1, 16, 2, 40, tied=False, learning_rate=1e-2, seed=2, max_length=LENGTH),
    StudentConfig("c", 1, 24, 2, 24, learning_rate=5e-3, seed=3, max_length=LENGTH),
]
TWIN = StudentConfig("twin", 1, 32, 4, 48, learning_rate=1e-2, seed=1, max_length=LENGTH)


class Shuffled(Llama):
    """Sees other tokens than those it is to continue."""

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None) -> Tensor:
        return super().forward(tokens_BL[:, torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))], rows_N)


def weigh(omega_S: Tensor) -> LossCoefficients:
    count = len(omega_S)
    kl_weight_SS = (count * ALPHA * omega_S).float().expand(count, count).clone().fill_diagonal_(0)
    return LossCoefficients((count * (1 - ALPHA) * omega_S).float(), kl_weight_SS, 1.0, "forward")


class Trial:
    """Some students, and the loop around them that engine.train has, as far as it matters here."""

    def __init__(
        self, folder: Path, place: runtime.Runtime, configs: list[StudentConfig], stage: int, outer: OuterConfig,
        state: OuterState | None = None, records: Any = None, optimizer: OptimizerConfig = OPTIMIZER,
    ) -> None:  # fmt: skip
        train = TrainConfig(zero_stage=stage)  # pyright: ignore[reportArgumentType]
        records = records or [None] * len(configs)
        self.cohort = Cohort(
            [
                Student(c, new_model(c, V, record), train, optimizer, place)
                for c, record in zip(configs, records, strict=True)
            ],
            place,
        )
        share: Any = dict(random_offsets=False, rank=place.rank, world_size=place.world_size, device=place.device)
        self.data, self.held_out = (
            TrainingData(
                TokenFile(folder / name, "uint16", LENGTH), batch=BATCH, micro_batch=2, seed=seed, **share
            )
            for seed, name in ((7, "train.bin"), (8, "held_out.bin"))
        )  # fmt: skip
        self.outer = OuterLoop(outer, len(configs), 12, weigh, place, state)

    def run(self, first: int, last: int) -> dict[str, list]:
        found = {"direct": [], "own": [], "peers": [], "omegas": [], "losses": []}
        for step in self.data.steps(first, last):
            self.outer.before_step(step, self.cohort)
            tally = accumulate(self.cohort, step, weigh(self.outer.weights))
            rates = [student.config.learning_rate for student in self.cohort]
            outcome = self.cohort.step(tally.losses_S, tally.ce_S, rates, stop=False)
            self.outer.after_step(step, self.cohort, self.held_out, skipped=bool(outcome.bad))
            if (update := self.outer.last) is not None:
                for term, value in update.gradient.items():
                    found[term].append(value)
                found["omegas"].append(update.omega)
                found["losses"].append([update.loss])
        return found


def differing(one: Cohort, other: Cohort) -> list[str]:
    pairs = [(x.name, x.record(), y.record()) for x, y in zip(one, other, strict=True)]
    return [f"{name} {key}" for name, x, y in pairs for key in x if not torch.equal(x[key], y[key])]


def planted(folder: Path, place: runtime.Runtime, fault: str) -> list[float]:
    bad = StudentConfig("bad", 1, 32, 4, 48, learning_rate=1e-9 if fault == "idle" else 1e-2, seed=2, max_length=LENGTH)
    configs = [TWIN, StudentConfig(**{**vars(TWIN), "name": "other"}), bad]
    trial = Trial(folder, place, configs, 0, OuterConfig(every=3, step_size=0.5, last_step_size=0.5))
    if fault == "shuffled":
        trial.cohort[2].model.__class__ = Shuffled
    trial.run(1, 30)
    return list(trial.outer.state.omega)


def preconditioned(folder: Path, place: runtime.Runtime) -> float:
    """A clipped step of AdamW without first moment and decay is its gradient times `inner_step_scale`: how far off, at
    worst, in a tensor's norm."""
    bare = OptimizerConfig(betas=(0.0, 0.95), weight_decay=0.0, clip=0.05)
    trial = Trial(folder, place, STUDENTS, 0, OuterConfig(), optimizer=bare)
    trial.run(1, 2)
    (step,) = trial.data.steps(3, 3)
    tally = accumulate(trial.cohort, step, weigh(trial.outer.weights))
    before = [{n: p.clone() for n, p in parameters_of(student).items()} for student in trial.cohort]
    gradients: list[dict[str, Any]] = [
        {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}
        for student in trial.cohort
    ]
    rates = [student.config.learning_rate for student in trial.cohort]
    trial.cohort.step(tally.losses_S, tally.ce_S, rates, stop=False)
    errors = []
    for student, old, gradient in zip(trial.cohort, before, gradients, strict=True):
        assert student.divisor > 1, "clipping acts, and is part of the scale"
        scale: Any = inner_step_scale(student, precondition=True)
        for name, new in parameters_of(student).items():
            expected = -scale[name] * gradient[name]
            errors.append((new - old[name] - expected).norm() / expected.norm())
    return torch.stack(errors).max().item()  # Python's own would pass over a NaN


def main(folder: Path) -> None:
    place = runtime.start()
    if place.world_size == 1:
        for seed, name in enumerate(("train.bin", "held_out.bin")):
            noise = np.random.default_rng(seed).integers(3, size=6000)
            tokens = np.zeros(6000, dtype=np.uint16)
            for i in range(1, 6000):
                tokens[i] = (7 * tokens[i - 1] + noise[i]) % V
            tokens.tofile(folder / f"{name}.partial")
            (folder / f"{name}.partial").rename(folder / name)
    # The world of one writes it, for both. No barrier here: a rank that saw the file would leave the other in it.
    while not (folder / "held_out.bin").is_file():
        time.sleep(0.1)
    every_step = OuterConfig(every=1)
    found: dict[str, Any] = {}
    for stage, method in [*((stage, "forward") for stage in range(4)), (0, "backward"), (0, "central")]:
        config = OuterConfig(every=1, method=method)  # pyright: ignore[reportArgumentType]
        found[f"zero{stage}-{method}"] = Trial(folder, place, STUDENTS, stage, config).run(1, 2)
    for stage in (0, 1, 2, 3):
        still = Trial(folder, place, STUDENTS, stage, OuterConfig(every=1, step_size=0, last_step_size=0))
        without = Trial(folder, place, STUDENTS, stage, OuterConfig())
        still.run(1, 2)
        without.run(1, 2)
        found[f"zero{stage}-undisturbed"] = differing(still.cohort, without.cohort)
    if place.world_size == 1:
        whole, begun = (Trial(folder, place, STUDENTS, 0, every_step) for _ in range(2))
        whole.run(1, 3)
        begun.run(1, 2)
        kept = json.loads(json.dumps(vars(begun.outer.state)))
        state = OuterState(tuple(kept["omega"]), kept["updates"])
        records = [student.record() for student in begun.cohort]
        resumed = Trial(folder, place, STUDENTS, 0, every_step, state, records)
        for student, record in zip(resumed.cohort, records, strict=True):
            student.restore(record, 2)
        resumed.run(3, 3)
        found["resumed"] = {
            "state": vars(resumed.outer.state),
            "state_of_whole": vars(whole.outer.state),
            "differing": differing(resumed.cohort, whole.cohort),
        }
        found["zero0-lagged"] = Trial(folder, place, STUDENTS, 0, OuterConfig(every=1, inner="lagged")).run(1, 2)
        found["preconditioned"] = preconditioned(folder, place)
        for fault in ("idle", "shuffled"):
            found[f"planted-{fault}"] = planted(folder, place, fault)
    if place.is_main_process:
        (folder / f"findings-{place.world}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    runtime.end()
