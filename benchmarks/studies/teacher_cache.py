"""What a cache of the teachers' predictions keeps, loses and saves.

    python benchmarks/studies/teacher_cache.py --corpus texts        after benchmarks/studies/baby_llama.py

On that study's text and models it prints bytes per token, the share of the teachers' probability that the k kept tokens
have, and the error of the trained student's gradient against the gradient from live teachers, for the whole loss and
for the divergence alone. Then it times steps with live teachers, with the cache and without teachers, interleaved.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.studies.baby_llama import ARMS, STUDENT, student
from benchmarks.studies.runs import settings_of, study_parser
from engine.config.loading import build
from engine.config.settings import CacheConfig, Config, ObjectiveConfig
from engine.data.batches import Step, TokenFile, TrainingData
from engine.data.prepare import Prepared, prepare
from engine.models.families import shape_of
from engine.models.huggingface import import_weights
from engine.students.coefficients import LossWeighting
from engine.students.cohort import Cohort
from engine.students.gradients import accumulate
from engine.students.student import Student, student_model
from engine.system.distributed import Runtime, init_distributed
from engine.system.errors import report_errors
from engine.teachers import cache as teacher_cache
from engine.teachers.teachers import Teachers, hash_teachers, load_teachers
from kernels import Projected, TopK, linear_ensemble_kl

KEPT_TOKENS = (8, 32, 128)


def main() -> None:
    parser = study_parser("baby_llama.py", __doc__)  # The runs are that study's.
    parser.add_argument("--steps", type=int, default=12, help="steps of each variant to time")
    arguments = parser.parse_args()

    settings = settings_of(arguments, "control-1", [student(1, STUDENT)], seed=1, tokens=10**6)
    settings["teachers"] = [{"path": str(arguments.folder / f"teacher-{name}")} for name in ARMS["both"]]
    settings["students"][0]["init"] = str(arguments.folder / "control-1" / "students" / "model")
    settings["objective"] = {"ce_weight": 0.5, "teacher_weight": 0.5, "temperature": 2.0}
    config, runtime = build(Config, settings), init_distributed()
    prepared = prepare(config.data)
    file = TokenFile(prepared.train, prepared.manifest["dtype"], config.train.length)
    data = TrainingData(
        file, batch=16, micro_batch=None, seed=1, random_offsets=False, rank=0, world_size=1, device=runtime.device
    )
    live = load_teachers(config, prepared.tokenizer, runtime.device)
    cohort = Cohort([student_of(config, prepared, runtime)], runtime)
    (first,) = data.steps(1, 1)
    print("| k | bytes per token | mass kept | gradient: cosine, relative error | of the divergence alone |")
    print("|---|---|---|---|---|")
    for k in KEPT_TOKENS:
        print(f"| {k} | " + " | ".join(quality(cohort[0], first, live, config, k)) + " |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = replace(config, cache=CacheConfig(folder, 32))
        begin = time.perf_counter()
        cached = teacher_cache.cached_teachers(cache, prepared, data, runtime, hash_teachers(cache))
        print(f"writing the cache of {len(file.tokens):,} tokens, k = 32: {time.perf_counter() - begin:.0f} s")
        time_steps(
            cohort,
            data,
            {"live teachers": live, "cache": cached, "no teachers": Teachers([], [], [], [])},
            config,
            arguments.steps,
        )


def student_of(config: Config, prepared: Prepared, runtime: Runtime) -> Student:
    (student_config,) = config.students
    vocab_size = prepared.tokenizer.vocab_size
    weights = import_weights(student_config, shape_of(student_config, vocab_size), prepared.tokenizer)
    model = student_model(student_config, vocab_size, weights)
    return Student(student_config, model, config.train, config.optimizer, runtime)


def quality(student: Student, step: Step, live: Teachers, config: Config, k: int) -> list[str]:
    """Returns the cells of the table for k tokens: size, mass, and the gradient's error with and without the text."""
    (batch,) = step.micro_batches
    (stream,) = live(batch)
    temperature, length = config.objective.temperature, config.train.length
    assert isinstance(stream, Projected)
    top = teacher_cache.top_k(stream, k, temperature)
    rows = [slice(at, at + length) for at in range(0, len(top.tail), length)]
    records = [teacher_cache.pack([[x[chunk] for x in top]]) for chunk in rows]
    unpacked = [teacher_cache.unpack(record, 1, length, k)[0] for record in records]
    kept = type(top)(*(torch.cat(parts) for parts in zip(*unpacked, strict=True)))

    def gradient(teacher: Projected | TopK, ce_weight: float) -> Tensor:
        objective, device = replace(config.objective, ce_weight=ce_weight), batch.tokens_BL.device
        coefficients = LossWeighting(objective, 1, device, [1.0]).coefficients()
        hidden_ND = student.model(batch.tokens_BL)
        result = linear_ensemble_kl(
            [student.model.project(hidden_ND)],
            [teacher],
            batch.targets_N,
            ce_weight=coefficients.ce_weight,
            kl_weight=coefficients.kl_weight,
            normalizer=step.valid_tokens,
            temperature=coefficients.temperature,
            divergence=coefficients.divergence,
        )
        gradients = torch.autograd.grad(result.losses[0], list(student.model.parameters()))
        return torch.cat([g.flatten() for g in gradients])

    cells = [f"{sum(map(len, records)) / len(top.tail):.0f}", f"{1 - top.tail.mean().item():.4f}"]
    for ce_weight in (config.objective.ce_weight, 0.0):
        exact, cached = gradient(stream, ce_weight), gradient(kept, ce_weight)
        cosine = torch.cosine_similarity(exact, cached, dim=0).item()
        cells.append(f"{cosine:.5f}, {((cached - exact).norm() / exact.norm()).item():.4f}")
    return cells


def time_steps(cohort: Cohort, data: TrainingData, variants: dict[str, Teachers], config: Config, steps: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in variants}

    def stepping(teachers: Teachers) -> Iterator[None]:
        objective = config.objective if teachers.names else ObjectiveConfig()
        coefficients = LossWeighting(objective, 1, data.device, teachers.weights).coefficients()
        for step in teachers.read_ahead(data.steps(1, steps + 2)):
            tally = accumulate(cohort, step, coefficients, teachers)
            cohort.update(tally.losses_S, tally.ce_S, [1e-5], stop=False)
            yield

    running: dict[str, Callable[[], None]] = {name: stepping(t).__next__ for name, t in variants.items()}
    for turn in range(steps + 2):
        for name, take in running.items():
            begin = time.perf_counter()
            take()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    for name, times in seconds.items():
        print(f"{name}: {1e3 * statistics.median(times):.0f} ms per step (median of {len(times)})")
    slow, fast = (statistics.median(seconds[name]) for name in ("live teachers", "cache"))
    print(f"live teachers / cache: {slow / fast:.2f}")


if __name__ == "__main__":
    with report_errors():
        main()
