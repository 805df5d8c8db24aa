"""What a cache of the teachers' predictions keeps, what it loses, and what it saves.

    python benchmarks/studies/teacher_cache.py --corpus texts        after benchmarks/studies/baby_llama.py

On the study's own text and models: bytes a token, the share of the teachers' probability among the k kept tokens, and
the error of the trained student's gradient (its whole loss's, and the divergence's alone) against the one that live
teachers give; then the time of a step with live teachers, with the cache, and with neither, interleaved.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.studies.baby_llama import ARMS, STUDENT, student
from benchmarks.studies.runs import settings_of
from engine.config.loading import build
from engine.config.settings import CacheConfig, Config, ObjectiveConfig
from engine.data.batches import Step, TokenFile, TrainingData
from engine.data.prepare import Prepared, prepare
from engine.system.errors import report_errors
from engine.models.families import shape_of
from engine.models.huggingface import import_weights
from engine.students.coefficients import coefficients
from engine.students.cohort import Cohort
from engine.students.gradients import accumulate
from engine.students.student import Student, new_model
from engine.system import distributed as runtime
from engine.teachers import cache as teacher_cache
from engine.teachers.frozen import NO_TEACHERS, Teachers, hash_teachers, load_teachers
from kernels import Projected, linear_ensemble_kl

KEPT = (8, 32, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--words", type=int, default=700_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/study-baby-llama"), help="of the study's runs")
    parser.add_argument("--steps", type=int, default=12, help="timed, of each variant")
    arguments = parser.parse_args()

    settings = settings_of(arguments, "control-1", [student(1, STUDENT)], seed=1, tokens=10**6)
    settings["teachers"] = [{"path": str(arguments.folder / f"teacher-{name}")} for name in ARMS["both"]]
    settings["students"][0]["init"] = str(arguments.folder / "control-1" / "students" / "model")
    settings["objective"] = {"ce": 0.5, "teachers": 0.5, "temperature": 2.0}
    config, place = build(Config, settings), runtime.start()
    prepared = prepare(config.data)
    file = TokenFile(prepared.train, prepared.manifest["dtype"], config.train.length)
    data = TrainingData(
        file, batch=16, micro_batch=None, seed=1, random_offsets=False, rank=0, world_size=1, device=place.device
    )
    live = load_teachers(config, prepared.tokenizer, place.device)
    cohort = Cohort([student_of(config, prepared, place)], place)
    (first,) = data.steps(1, 1)
    print("| k | bytes a token | mass kept | gradient: cosine, relative error | of the divergence alone |")
    print("|---|---|---|---|---|")
    for k in KEPT:
        print(f"| {k} | " + " | ".join(quality(cohort[0], first, live, config, k)) + " |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = replace(config, cache=CacheConfig(folder, 32))
        begin = time.perf_counter()
        cached = teacher_cache.teachers(cache, prepared, data, place, hash_teachers(cache))
        print(f"writing the cache of {len(file.tokens):,} tokens, k = 32: {time.perf_counter() - begin:.0f} s")
        times(cohort, data, {"live teachers": live, "cache": cached, "neither": NO_TEACHERS}, config, arguments.steps)


def student_of(config: Config, prepared: Prepared, place: runtime.Runtime) -> Student:
    (one,) = config.students
    weights = import_weights(one, shape_of(one, prepared.tokenizer.vocab_size), prepared.tokenizer)
    return Student(one, new_model(one, prepared.tokenizer.vocab_size, weights), config.train, config.optimizer, place)


def quality(student: Student, step: Step, live: Teachers, config: Config, k: int) -> list[str]:
    (batch,) = step.micro_batches
    (stream,) = live(batch)
    temperature, length = config.objective.temperature, config.train.length
    assert isinstance(stream, Projected)
    top = teacher_cache.top_of(stream, k, temperature)
    rows = [slice(at, at + length) for at in range(0, len(top.tail), length)]
    records = [teacher_cache.pack([[x[chunk] for x in top]]) for chunk in rows]
    unpacked = [teacher_cache.unpack(record, 1, length, k)[0] for record in records]
    kept = type(top)(*(torch.cat(parts) for parts in zip(*unpacked, strict=True)))

    def gradient(teacher: object, ce: float) -> Tensor:
        weights = coefficients(replace(config.objective, ce=ce), 1, batch.tokens_BL.device, teachers=[1.0])
        hidden_ND = student.model(batch.tokens_BL)
        streams, teachers = [Projected(hidden_ND, student.model.head)], [teacher]
        result = linear_ensemble_kl(
            streams,
            teachers,  # pyright: ignore[reportArgumentType]
            batch.targets_N,
            normalizer=step.valid_tokens,
            **vars(weights),
        )
        found = torch.autograd.grad(result.losses[0], list(student.model.parameters()))
        return torch.cat([g.flatten() for g in found])

    cells = [f"{sum(map(len, records)) / len(top.tail):.0f}", f"{1 - top.tail.mean().item():.4f}"]
    for ce in (config.objective.ce_weight, 0.0):
        exact, found = gradient(stream, ce), gradient(kept, ce)
        cosine = torch.cosine_similarity(exact, found, dim=0).item()
        cells.append(f"{cosine:.5f}, {((found - exact).norm() / exact.norm()).item():.4f}")
    return cells


def times(cohort: Cohort, data: TrainingData, variants: dict[str, Teachers], config: Config, steps: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in variants}

    def stepping(teachers: Teachers) -> Iterator[None]:
        objective = config.objective if teachers.names else ObjectiveConfig()
        weights = coefficients(objective, 1, torch.device("cpu"), teachers=teachers.weights)
        for step in teachers.ahead(data.steps(1, steps + 2)):
            tally = accumulate(cohort, step, weights, teachers)
            cohort.step(tally.losses_S, tally.ce_S, [1e-5], stop=False)
            yield

    running: dict[str, Callable[[], None]] = {name: stepping(t).__next__ for name, t in variants.items()}
    for turn in range(steps + 2):
        for name, take in running.items():
            begin = time.perf_counter()
            take()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    for name, found in seconds.items():
        print(f"{name}: {1e3 * statistics.median(found):.0f} ms a step (median of {len(found)})")
    slow, fast = (statistics.median(seconds[name]) for name in ("live teachers", "cache"))
    print(f"live teachers / cache: {slow / fast:.2f}")


if __name__ == "__main__":
    with report_errors():
        main()
