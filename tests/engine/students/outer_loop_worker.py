"""One rank of the outer loop's tests with students in DeepSpeed engines; rank 0 writes the findings as JSON.

test_outer_loop.py runs it with RANK and its like set.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from engine.config.settings import ObjectiveConfig, OptimizerConfig, OuterConfig, StudentConfig, TrainConfig
from engine.data.batches import TokenFile, TrainingData
from engine.models.llama import Llama
from engine.students.coefficients import LossWeighting
from engine.students.cohort import Cohort
from engine.students.gradients import accumulate
from engine.students.outer_loop import OuterLoop, OuterState
from engine.students.student import Student, student_model
from engine.system.distributed import Runtime, exit_process, init_distributed
from tests.engine.students import slow_hypergradient

V, LENGTH, BATCH, ALPHA = 31, 16, 8, 0.5
OPTIMIZER = OptimizerConfig(clip=1.5)
OBJECTIVE = ObjectiveConfig(ce_weight=1 - ALPHA, peer_weight=ALPHA, weighted=True)
STUDENTS = [
    StudentConfig("a", 2, 32, 4, 48, kv_heads=2, learning_rate=3e-3, seed=1, max_length=LENGTH),
    StudentConfig("b", 1, 16, 2, 40, tied=False, learning_rate=1e-2, seed=2, max_length=LENGTH),
    StudentConfig("c", 1, 24, 2, 24, learning_rate=5e-3, seed=3, max_length=LENGTH),
]
TWIN = StudentConfig("twin", 1, 32, 4, 48, learning_rate=1e-2, seed=1, max_length=LENGTH)


class Shuffled(Llama):
    """Reads the tokens in another order than the one that it is to continue."""

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None, dropout_seeds_B: Tensor | None = None) -> Tensor:
        order_L = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))
        return super().forward(tokens_BL[:, order_L], rows_N)


class Trial:
    """Some students, and the loop around them that engine.train has, as far as it matters here."""

    def __init__(
        self, folder: Path, runtime: Runtime, configs: list[StudentConfig], stage: int, outer: OuterConfig,
        state: OuterState | None = None, student_states: Any = None,
    ) -> None:  # fmt: skip
        train = TrainConfig(zero_stage=stage)  # pyright: ignore[reportArgumentType]
        student_states = student_states or [None] * len(configs)
        self.cohort = Cohort(
            [
                Student(config, student_model(config, V, student_state), train, OPTIMIZER, runtime)
                for config, student_state in zip(configs, student_states, strict=True)
            ],
            runtime,
        )
        self.data, held_out = (
            TrainingData(
                TokenFile(folder / name, "uint16", LENGTH),
                batch=BATCH,
                micro_batch=2,
                seed=seed,
                random_offsets=False,
                rank=runtime.rank,
                world_size=runtime.world_size,
                device=runtime.device,
            )
            for seed, name in ((7, "train.bin"), (8, "held_out.bin"))
        )
        weighting = LossWeighting(OBJECTIVE, len(configs), runtime.device)
        self.outer = OuterLoop(outer, 12, weighting, held_out, state)

    def run(self, first: int, last: int) -> dict[str, list]:
        """Takes steps, and returns what the updates of ω brought."""
        updates = {"direct": [], "own": [], "peers": [], "omegas": [], "losses": []}
        coefficients = self.outer.coefficients()
        for step in self.data.steps(first, last):
            self.outer.before_step(step, self.cohort)
            tally = accumulate(self.cohort, step, coefficients)
            rates = [student.config.learning_rate for student in self.cohort]
            verdict = self.cohort.update(tally.losses_S, tally.ce_S, rates, stop=False)
            coefficients = self.outer.after_step(step, self.cohort, coefficients, verdict)
            if (update := self.outer.last_update) is not None:
                for term, value in update.gradient.items():
                    updates[term].append(value)
                updates["omegas"].append(update.omega)
                updates["losses"].append([update.loss])
        return updates


def differing(ours: Cohort, theirs: Cohort) -> list[str]:
    """Returns the names of the tensors that are not equal in both cohorts' states."""
    pairs = [(x.name, x.state(), y.state()) for x, y in zip(ours, theirs, strict=True)]
    return [f"{name} {key}" for name, x, y in pairs for key in x if not torch.equal(x[key], y[key])]


def planted(folder: Path, runtime: Runtime, fault: str) -> list[float]:
    """Returns ω after 30 steps of two equal students and one that cannot learn."""
    rate = 1e-9 if fault == "idle" else 1e-2
    unable = StudentConfig("unable", 1, 32, 4, 48, learning_rate=rate, seed=2, max_length=LENGTH)
    configs = [TWIN, StudentConfig(**{**vars(TWIN), "name": "other"}), unable]
    trial = Trial(folder, runtime, configs, 0, OuterConfig(every=3, step_size=0.5, last_step_size=0.5))
    if fault == "idle":
        trial.run(1, 30)
        return list(trial.outer.state.omega)
    shuffled = trial.cohort[2]
    shuffled.model.__class__ = Shuffled

    def new_model(shape: Any) -> Llama:
        return Shuffled(shape) if shape is shuffled.shape else Llama(shape)

    with mock.patch("engine.students.hypergradient.new_model", new_model):
        trial.run(1, 30)
    return list(trial.outer.state.omega)


def main(folder: Path) -> None:
    runtime = init_distributed()
    if runtime.world_size == 1:
        for seed, name in enumerate(("train.bin", "held_out.bin")):
            noise = np.random.default_rng(seed).integers(3, size=6000)
            tokens = np.zeros(6000, dtype=np.uint16)
            for i in range(1, 6000):
                tokens[i] = (7 * tokens[i - 1] + noise[i]) % V
            tokens.tofile(folder / f"{name}.partial")
            (folder / f"{name}.partial").rename(folder / name)
    # The world of one rank writes the text for both worlds. No barrier here: a rank that sees the file goes on.
    while not (folder / "held_out.bin").is_file():
        time.sleep(0.1)
    every_step = OuterConfig(every=1)
    findings: dict[str, Any] = {}
    for stage in range(4):
        findings[f"zero{stage}"] = Trial(folder, runtime, STUDENTS, stage, every_step).run(1, 2)
    with mock.patch("engine.students.hypergradient._inner_derivatives", slow_hypergradient.inner_derivatives):
        findings["zero0-backward-passes"] = Trial(folder, runtime, STUDENTS, 0, every_step).run(1, 2)
    for stage in range(4):
        still = Trial(folder, runtime, STUDENTS, stage, OuterConfig(every=1, step_size=0, last_step_size=0))
        without = Trial(folder, runtime, STUDENTS, stage, OuterConfig())
        still.run(1, 2)
        without.run(1, 2)
        findings[f"zero{stage}-undisturbed"] = differing(still.cohort, without.cohort)
    if runtime.world_size == 1:
        whole, begun = (Trial(folder, runtime, STUDENTS, 0, every_step) for _ in range(2))
        whole.run(1, 3)
        begun.run(1, 2)
        stored = json.loads(json.dumps(vars(begun.outer.state)))
        state = OuterState(tuple(stored["omega"]), stored["updates"])
        student_states = [student.state() for student in begun.cohort]
        resumed = Trial(folder, runtime, STUDENTS, 0, every_step, state, student_states)
        for student, student_state in zip(resumed.cohort, student_states, strict=True):
            student.restore(student_state, 2)
        resumed.run(3, 3)
        findings["resumed"] = {
            "state": vars(resumed.outer.state),
            "state_of_whole": vars(whole.outer.state),
            "differing": differing(resumed.cohort, whole.cohort),
        }
        for fault in ("idle", "shuffled"):
            findings[f"planted-{fault}"] = planted(folder, runtime, fault)
    if runtime.is_main_process:
        (folder / f"findings-{runtime.world_size}.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process()
