"""One rank of the parity tests: it runs every case in one process group, and rank 0 writes the findings as JSON.

test_parity.py runs it with RANK and its like set. A case trains students by Crèche's cohort and by `plain_loop`, a loop
in plain PyTorch without DeepSpeed, ranks, accumulation, chunks or fused losses. The students learn from the text, from
one another and from two frozen teachers at once; one is a GPT-2 with dropout.
"""

import itertools
import json
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.settings import Config, ObjectiveConfig, OptimizerConfig, StudentConfig, TeacherConfig, TrainConfig
from engine.data.batches import IGNORED, TokenFile, TrainingData
from engine.models.base import LanguageModel, initial_weights
from engine.models.dropout import dropout_seeds
from engine.models.families import new_model, shape_of
from engine.students.coefficients import LossCoefficients, LossWeighting
from engine.students.cohort import Cohort
from engine.students.gradients import accumulate
from engine.students.student import Student, decay_groups, student_model
from engine.system.distributed import Runtime, exit_process, init_distributed
from engine.teachers.teachers import Teacher, Teachers, teacher_shares, teacher_streams

VOCABULARY, LENGTH, BATCH, STEPS = 61, 16, 8, 20
OPTIMIZER = OptimizerConfig(clip=1.5, weight_decay=0.1)
OBJECTIVE = ObjectiveConfig(ce_weight=0.8, peer_weight=0.9, teacher_weight=0.7, temperature=2.0)
TEACHERS = [
    StudentConfig("gpt2", 1, 32, 4, 48, family="gpt2", dropout=0.5, seed=8, max_length=LENGTH),
    StudentConfig("llama", 2, 16, 2, 40, tied=False, seed=9, max_length=LENGTH),
]


def students(tied: bool) -> list[StudentConfig]:
    return [
        StudentConfig("a", 2, 32, 4, 48, kv_heads=2, tied=tied, learning_rate=3e-4, seed=1, max_length=LENGTH),
        StudentConfig("b", 1, 16, 2, 40, tied=tied, learning_rate=1e-3, seed=2, max_length=LENGTH),
        StudentConfig(
            "c", 1, 24, 2, 24, tied=not tied, family="gpt2", dropout=0.1, learning_rate=5e-4, seed=3, max_length=LENGTH
        ),
    ]


def plain_model(config: StudentConfig) -> LanguageModel:
    model = new_model(shape_of(config, VOCABULARY))
    initial_weights(model, config.layers, config.seed)
    return model


def confident_teachers() -> list[LanguageModel]:
    """Returns the teachers, with ten times larger initial weights, so that their predictions are far from uniform."""
    models = [plain_model(config).eval() for config in TEACHERS]
    with torch.no_grad():
        for parameter in (p for model in models for p in model.parameters() if p.ndim == 2):
            parameter.mul_(10)
    return models


def teaching(precision: str, students: int, runtime: Runtime) -> tuple[Teachers, LossCoefficients]:
    config = Config((), tuple(TeacherConfig(teacher.name) for teacher in TEACHERS))
    models = [model.bfloat16() if precision == "bf16" else model for model in confident_teachers()]
    frozen = [Teacher(model) for model in models]
    teachers = Teachers(*teacher_streams(config), frozen, teacher_shares(config))
    return teachers, LossWeighting(OBJECTIVE, students, runtime.device, teachers.weights).coefficients()


def data(file: TokenFile, micro_batch: int | None, rank: int, world_size: int) -> TrainingData:
    return TrainingData(
        file,
        batch=BATCH,
        micro_batch=micro_batch,
        seed=7,
        random_offsets=False,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
    )


@cache
def plain_loop(tied: bool, path: Path) -> tuple[list[list[float]], list[list[float]], list[dict[str, torch.Tensor]]]:
    """Trains by deep mutual learning from its equations (Zhang et al. 2018), and returns losses, norms and weights.

    It has whole batches, full logits and one autograd graph.
    """
    file = TokenFile(path, "uint16", LENGTH)
    models, optimizers = [], []
    for config in students(tied):
        model = plain_model(config)
        models.append(model)
        groups = decay_groups(model, OPTIMIZER.weight_decay)
        optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps))
    temperature, losses, norms, teachers = OBJECTIVE.temperature, [], [], confident_teachers()
    for step in data(file, None, 0, 1).steps(1, STEPS):
        (batch,) = step.micro_batches
        assert batch.samples_B is not None
        seeds_B = dropout_seeds(students(tied)[2].seed, batch.samples_B)
        hidden = [
            model(batch.tokens_BL, None, *[seeds_B][: i // 2]) for i, model in enumerate(models)
        ]  # the third has dropout
        logits = [h @ model.head.T for h, model in zip(hidden, models, strict=True)]
        with torch.no_grad():
            teacher_NV = sum(model(batch.tokens_BL) @ model.head.T for model in teachers) / len(teachers)
        predicted = batch.targets_N != IGNORED
        logs = [F.log_softmax(z[predicted] / temperature, -1) for z in [*logits, teacher_NV]]
        losses.append([])
        norms.append([])
        for i, model in enumerate(models):
            loss = OBJECTIVE.ce_weight * F.cross_entropy(logits[i], batch.targets_N)
            for j in range(len(logs)):
                if j != i:
                    weight = OBJECTIVE.peer_weight / (len(models) - 1) if j < len(models) else OBJECTIVE.teacher_weight
                    kl = F.kl_div(logs[i], logs[j].detach(), reduction="batchmean", log_target=True)
                    loss = loss + temperature**2 * weight * kl
            loss.backward()
            losses[-1].append(loss.item())
            norms[-1].append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses, norms, [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]


def cohort_of(configs: list[StudentConfig], train: TrainConfig, runtime: Runtime) -> Cohort:
    models = [student_model(c, VOCABULARY, recompute=train.recompute) for c in configs]
    return Cohort([Student(c, m, train, OPTIMIZER, runtime) for c, m in zip(configs, models, strict=True)], runtime)


def weights(cohort: Cohort) -> list[dict[str, torch.Tensor]]:
    return [
        {k.removeprefix("weight/"): v for k, v in student.state().items() if k.startswith("weight/")}
        for student in cohort
    ]


def largest_difference(ours: list[dict], theirs: list[dict]) -> float:
    """Returns the largest |ours − theirs| / |theirs| of all tensors, in the Euclidean norm.

    The biases of GPT-2's keys are left out: softmax does not depend on them, so their gradients are rounding errors, of
    which AdamW makes whole steps.
    """

    def without_key_bias(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) if name.endswith("c_attn.bias") else x

    differences = [
        (without_key_bias(name, a[name]) - without_key_bias(name, b[name])).norm()
        / without_key_bias(name, b[name]).norm()
        for a, b in zip(ours, theirs, strict=True)
        for name in b
    ]
    return torch.stack(differences).max().item()  # Python's own max would pass over a NaN.


def parity(
    runtime: Runtime,
    path: Path,
    stage: int,
    accumulation: int,
    tied: bool,
    precision: str = "fp32",
    **options: bool,
) -> dict:
    configs, file = students(tied), TokenFile(path, "uint16", LENGTH)
    train = TrainConfig(zero_stage=stage, precision=precision, **options)  # pyright: ignore[reportArgumentType]
    cohort = cohort_of(configs, train, runtime)
    teachers, coefficients = teaching(precision, len(cohort), runtime)
    micro_batch = BATCH // runtime.world_size // accumulation
    losses, norms = [], []
    for step in data(file, micro_batch, runtime.rank, runtime.world_size).steps(1, STEPS):
        assert len(step.micro_batches) == accumulation
        tally = accumulate(cohort, step, coefficients, teachers)
        losses.append(runtime.all_reduce_sum(tally.losses_S.clone()))
        norms.append(
            cohort.update(tally.losses_S, tally.ce_S, [c.learning_rate for c in configs], stop=False).gradient_norms
        )
    expected_losses, expected_norms, expected_weights = plain_loop(tied, path)
    return {
        "norms": (torch.tensor(norms) / torch.tensor(expected_norms) - 1).abs().max().item(),
        "clipped": (torch.tensor(expected_norms) > OPTIMIZER.clip).float().mean().item(),
        "losses": (torch.tensor(losses) / torch.tensor(expected_losses) - 1).abs().max().item(),
        "weights": largest_difference(weights(cohort), expected_weights),
        "fell": expected_losses[0][0] - expected_losses[-1][0],
    }


class Waits(TorchDispatchMode):
    """Counts the tensors that become Python numbers: for each, the host would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def poison(runtime: Runtime, file: TokenFile, stage: int, what: str, precision: str) -> dict:
    """Puts a NaN into student b on the last rank, and returns what moves and whether the next step works."""
    configs = students(tied=True)
    cohort = cohort_of(configs, TrainConfig(zero_stage=stage, precision=precision), runtime)  # pyright: ignore[reportArgumentType]
    teachers, coefficients = teaching(precision, len(cohort), runtime)
    rates = [c.learning_rate for c in configs]
    first, second, third = data(file, None, runtime.rank, runtime.world_size).steps(1, 3)
    tally = accumulate(cohort, first, coefficients, teachers)
    cohort.update(tally.losses_S, tally.ce_S, rates, stop=False)
    before = [student.state() for student in cohort]

    bad_rank = runtime.rank == runtime.world_size - 1
    hooks = []
    model: Any = cohort[1].model
    if what == "gradient" and bad_rank:
        hooks.append(model.norm.weight.register_hook(lambda g: g * float("nan")))
    if what == "forward" and bad_rank:  # It reaches the losses of all through the divergence.
        hooks.append(model.norm.register_forward_hook(lambda _, __, out: (out[0] * float("nan"), out[1])))
    tally = accumulate(cohort, second, coefficients, teachers)
    for hook in hooks:
        hook.remove()
    if what == "loss" and bad_rank:
        tally.losses_S[1] = float("inf")
    verdict = cohort.update(tally.losses_S, tally.ce_S, rates, stop=runtime.rank == 0)
    after = [student.state() for student in cohort]
    tally = accumulate(cohort, third, coefficients, teachers)
    with Waits() as waits:
        third_verdict = cohort.update(tally.losses_S, tally.ce_S, rates, stop=False)
    later = [student.state() for student in cohort]
    return {
        "not_finite": verdict.not_finite,
        "stop": verdict.stop,
        "moved": sum(not torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a),
        "later_not_finite": third_verdict.not_finite,
        "later_moved": sum(not torch.equal(a[k], b[k]) for a, b in zip(after, later, strict=True) for k in a),
        "later_finite": all(t.isfinite().all().item() for state in later for t in state.values()),
        "tensors": sum(len(state) for state in before),
        "waits": waits.count,
    }


def separate(runtime: Runtime, file: TokenFile, stage: int) -> dict:
    """Returns which students hold a gradient, in a parameter or in ZeRO's buffers, after each student's backward."""
    cohort = cohort_of(students(tied=True), TrainConfig(zero_stage=stage), runtime)  # pyright: ignore[reportArgumentType]
    teachers, coefficients = teaching("fp32", len(cohort), runtime)
    (step,) = data(file, None, runtime.rank, runtime.world_size).steps(1, 1)
    assert len(step.micro_batches) == 1
    holders, backward = {}, Student.backward

    def backward_alone(student: Student, loss: Tensor, *, last: bool) -> None:
        backward(student, loss, last=last)
        holders[student.name] = [other.name for other in cohort if holds_gradient(other)]
        student.discard_gradients()

    with mock.patch.object(Student, "backward", backward_alone):
        accumulate(cohort, step, coefficients, teachers)
    return holders


def holds_gradient(student: Student) -> bool:
    reduced = getattr(student.engine.optimizer, "averaged_gradients", {})
    return any(p.grad is not None for p in student.model.parameters()) or any(g is not None for g in reduced.values())


def main(folder: Path) -> None:
    runtime = init_distributed()
    path = folder / f"tokens-{runtime.world_size}.bin"
    if runtime.is_main_process:
        np.random.default_rng(0).zipf(1.3, 4000).clip(1, VOCABULARY - 1).astype(np.uint16).tofile(path)
    runtime.barrier()
    file = TokenFile(path, "uint16", LENGTH)
    findings = {}
    for stage, accumulation, tied in itertools.product((0, 1, 2, 3), (1, 4), (True, False)):
        name = f"zero{stage}-accumulation{accumulation}-{'tied' if tied else 'untied'}"
        findings[f"parity-{name}"] = parity(runtime, path, stage, accumulation, tied)
    findings["parity-zero1-recompute"] = parity(runtime, path, 1, 1, True, recompute=True)
    findings["parity-zero3-recompute"] = parity(runtime, path, 3, 4, True, recompute=True)
    graphs = partial(torch.compile, backend="aot_eager")  # Making code as well would take minutes.
    with mock.patch.object(torch, "compile", graphs):
        findings["parity-zero1-compile"] = parity(runtime, path, 1, 4, True, compile=True)
        findings["parity-zero2-compile-recompute"] = parity(runtime, path, 2, 1, False, compile=True, recompute=True)
    for stage in (1, 2, 3):
        findings[f"parity-zero{stage}-bf16"] = parity(runtime, path, stage, 2, True, precision="bf16")
    for stage, what in itertools.product((0, 1, 2, 3), ("loss", "gradient", "forward")):
        findings[f"poison-zero{stage}-{what}-fp32"] = poison(runtime, file, stage, what, "fp32")
    for stage in (1, 2, 3):
        findings[f"poison-zero{stage}-gradient-bf16"] = poison(runtime, file, stage, "gradient", "bf16")
    for stage in (0, 1, 2, 3):
        findings[f"separate-zero{stage}"] = separate(runtime, file, stage)
    if runtime.is_main_process:
        (folder / f"findings-{runtime.world_size}.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process()
