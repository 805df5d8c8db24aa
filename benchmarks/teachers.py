"""What teachers cost in a step: live, with a cache of their hidden states, and none; and what it costs to write one.

    python benchmarks/teachers.py --threads 2                      Baby Llama's proportions, at a quarter of every width
    python benchmarks/teachers.py --task readme --threads 2        the README's distillation task
    python benchmarks/teachers.py --quality runs/distilled         int8: how far the student's gradient is from exact

    live        the teachers predict in every step
    cached      their hidden states are read
    none        the student learns from the text alone
    heads       the products of the hidden states with the teachers' heads, alone

Every variant but the last is `engine.train.train` itself in a process of its own. They take their steps in turn
(benchmarks.timing). Before them, teachers read the whole text without students, step by step in turn live and writing
the cache. Text and weights are random.

N tokens, D hidden of all teachers together, V vocabulary.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import STUDENTS, TEACHERS, Case, case
from benchmarks.throughput import Process, device, processes, teacher_shapes
from engine.config.loading import build, read_yaml
from engine.config.settings import CacheConfig, Config
from engine.data.batches import Batch, TokenFile, TrainingData
from engine.data.prepare import Prepared, prepare
from engine.models.base import LanguageModel
from engine.models.families import parameter_count
from engine.models.huggingface import load_model
from engine.students.coefficients import LossWeighting
from engine.system.distributed import Runtime, init_distributed
from engine.system.errors import report_errors
from engine.system.provenance import device_name, git_commit
from engine.teachers.cache import cached_teachers
from engine.teachers.store import stored
from engine.teachers.teachers import STORAGE, Teachers, hash_teachers, load_teachers
from kernels import linear_ensemble_kl

# Shapes of the student and of the teachers, and the vocabulary. Baby Llama's have a quarter of every width of the
# paper's, so that each has 1/16 of its parameters; the GPT-2 is a LLaMA with as many products.
TASKS = {
    "baby-llama": (["16x128x8x256"], ["24x384x8x1024", "24x256x8x768"], 4000),
    "readme": (STUDENTS, TEACHERS, 16000),
}
VARIANTS = ("live", "cached", "none", "heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="baby-llama")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings as recipes have them")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--quality", type=Path, metavar="RUN", help="measure int8 on a finished run instead")
    options = parser.parse_args()
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        torch.set_num_threads(options.threads)
    if options.quality is not None:
        print(quality(options.quality))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.task, options.set, options.rounds)


def measure(folder: Path, task: str, overrides: list[str], rounds: int) -> None:
    """Prints the time of every variant's step, and the ratios between them."""
    shapes, teachers, vocab_size = TASKS[task]
    live = case(folder, "distil", 1, len(teachers), vocab_size, "auto", overrides, shapes, teachers)
    run = replace(live.config.run, name=f"{live.config.run.name}-cached")
    cached = replace(live, config=replace(live.config, run=run, cache=CacheConfig(str(folder / "cache"))))
    writing = fill(live.config, cached.config)
    cases = {
        "live": live,
        "cached": cached,
        "none": case(folder, "plain", 1, 0, vocab_size, "auto", overrides, shapes, teachers),
    }
    with processes([(variant, "ours") for variant in cases.values()]) as running:
        steps = {name: timing.Variant(Process.step, partial(_always, running[c, "ours"])) for name, c in cases.items()}
        variants = {**steps, "heads": timing.Variant(_multiply, partial(_always, heads(live)))}
        compared = timing.compare(variants, "none", _clock, rounds=rounds, sample_seconds=0.0)

    student, *taught = [parameter_count(shape) for shape in (*live.student_shapes, *teacher_shapes(live))]
    hidden = sum(shape.hidden for shape in teacher_shapes(live))
    print(f"{device_name(device())}, {git_commit()}, {live}, {rounds} rounds")
    print(f"parameters: {student:,}, teachers {sum(taught) / student:.1f} times as many")
    print(f"cache: {hidden * STORAGE[live.config.train.precision].itemsize:,} bytes a token, int8 {hidden + 8:,}")
    for name in VARIANTS:
        time = compared.time(name)
        print(f"  {name:8} {1000 * time.median:9.1f} ms ({1000 * time.low:.1f} to {1000 * time.high:.1f})")
    rounds_of = compared.seconds
    parts = zip(rounds_of["cached"], rounds_of["none"], rounds_of["heads"], strict=True)
    over = timing.Quantiles.of([cached / (none + products) for cached, none, products in parts])
    for text, ratio in (
        ("live / cached", compared.ratio("live", "cached")),
        ("cached / (none + heads)", over),
    ):
        print(f"  {text}: {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
    print(f"  writing / live, teachers alone: {writing:.3f}")
    print(f"  {compared.verdict()}")


def _always(state: Any, _: int) -> Any:
    return state


def _clock(run: Callable[[Any], Any], state: Any) -> float:
    """Returns the seconds of a step as its process has measured them, or of the products."""
    return run(state).seconds if isinstance(state, Process) else timing.clock_of(device())(run, state)


def heads(live: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns the operands and results of the products with the teachers' heads in a step."""
    train, options = live.config.train, {"device": device(), "dtype": STORAGE[live.config.train.precision]}
    shapes, tokens = teacher_shapes(live), train.batch * train.length
    hidden = sum(shape.hidden for shape in shapes)
    left, right = torch.randn(tokens, hidden, **options), torch.randn(hidden, live.vocab_size, **options)
    return [(left, right, torch.empty(tokens, live.vocab_size, **options))]


def _multiply(products: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for left, right, out in products:
        torch.mm(left, right, out=out)


def fill(live: Config, cached: Config) -> float:
    """Writes the whole cache, and returns the teachers' time until its last byte over that of live teachers.

    Both read a step in turn. What a thread still writes during the other's step is not counted.
    """
    runtime, prepared = init_distributed(), prepare(live.data, log=lambda _: None)
    data, seconds = training_data(live, prepared, runtime), {"live": 0.0, "writing": 0.0}
    steps = -(-data.file.chunks // live.train.batch)
    with ExitStack() as stack:
        hashes = hash_teachers(cached)
        teachers: dict[str, Teachers] = {
            "live": load_teachers(live, prepared.tokenizer, data.file, runtime.device),
            "writing": cached_teachers(cached, prepared, data.file, runtime, hashes, stack),
        }
        readers = {name: t.read_ahead(data.steps(1, steps)) for name, t in teachers.items()}
        for number in range(steps):
            for name in timing.order(list(teachers), number):
                begin = time.perf_counter()
                for batch in next(readers[name]).micro_batches:
                    teachers[name](batch)
                seconds[name] += time.perf_counter() - begin
        begin = time.perf_counter()
    seconds["writing"] += time.perf_counter() - begin
    return seconds["writing"] / seconds["live"]


def training_data(config: Config, prepared: Prepared, runtime: Runtime) -> TrainingData:
    return TrainingData(
        TokenFile(prepared.train, prepared.manifest["dtype"], config.train.length),
        batch=config.train.batch,
        micro_batch=None,
        seed=config.train.seed,
        random_offsets=config.train.chunks == "random",
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )


def quality(folder: Path) -> str:
    """Returns how far the first batch's gradient of a finished run's student is from exact where states are int8."""
    config, runtime = build(Config, read_yaml(folder / "config.yaml")), init_distributed()
    prepared = prepare(config.data, log=lambda _: None)
    data = training_data(config, prepared, runtime)
    teachers = load_teachers(config, prepared.tokenizer, data.file, runtime.device)
    student, _ = load_model(folder / "students" / config.students[0].name)
    student = student.to(runtime.device).train().requires_grad_(True)
    (step,) = data.steps(1, 1)
    exact, dtype = step.micro_batches[0], STORAGE[config.train.precision]
    with torch.no_grad():
        states = [teachers.states(number, exact) for number in range(len(teachers.teachers))]
    rounded = [stored(states_ND, int8=True).values(dtype) for states_ND in states]
    lines = ["| | cosine | relative error |", "|---|---|---|"]
    pairs = list(zip(rounded, states, strict=True))
    lines += [
        f"| {t.shape.title}'s states | {_difference(*pair)} |" for t, pair in zip(teachers.teachers, pairs, strict=True)
    ]
    for text, ce_weight in (("gradient of the loss", config.objective.ce_weight), ("of the divergence alone", 0.0)):
        gradients = [
            _gradient(config, student, teachers, replace(exact, teacher_states=tuple(x)), ce_weight)
            for x in (rounded, states)
        ]
        lines.append(f"| {text} | {_difference(*gradients)} |")
    return "\n".join(lines)


def _difference(rounded: Tensor, exact: Tensor) -> str:
    rounded, exact = rounded.flatten().double(), exact.flatten().double()
    cosine = torch.cosine_similarity(rounded, exact, dim=0).item()
    return f"{cosine:.6f} | {((rounded - exact).norm() / exact.norm()).item():.5f}"


def _gradient(config: Config, student: LanguageModel, teachers: Teachers, batch: Batch, ce_weight: float) -> Tensor:
    objective = replace(config.objective, ce_weight=ce_weight)
    coefficients = LossWeighting(objective, 1, batch.tokens_BL.device, teachers.weights).coefficients()
    result = linear_ensemble_kl(
        [student.project(student(batch.tokens_BL))],
        teachers(batch),
        batch.targets_N,
        ce_weight=coefficients.ce_weight,
        kl_weight=coefficients.kl_weight,
        normalizer=len(batch.targets_N),
        temperature=coefficients.temperature,
        divergence=coefficients.divergence,
    )
    gradients = torch.autograd.grad(result.losses[0], list(student.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


if __name__ == "__main__":
    with report_errors():
        main()
