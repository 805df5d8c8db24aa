"""Everything that needs a GPU, on a machine that has one, in under ten minutes: one JSON file with the device's name.

    python benchmarks/gpu.py [--out gpu.json]        (`make gpu`)

Runs the kernels' tests and the mutual recipe in bf16 at ZeRO 1 and 3, side by side since nothing is timed there, then
one after the other the benchmarks and torch.compile of models, each in a process of its own with a limit of seconds.
What a job leaves of its limit the next may take. What fails or exceeds its limit is recorded, and the rest goes on; the
exit status is then 1. The file is rewritten after each. flash-attn and Liger take part where they are installed.
"""

import argparse
import csv
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.system.provenance import git_commit

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "deepspeed", "flash-attn", "liger-kernel", "transformers")
SECONDS = 580  # from this process's start to the end of the last job
UNTIMED_SECONDS = 150  # for those that run side by side
TEST_SECONDS = 100  # for a test, so that one that hangs is named
MOST_WORKERS = 16  # of pytest; each holds some hundreds of megabytes of the GPU
TESTS = ("tests/kernels/ops/triton", "tests/engine/models/test_compiled.py")
# As one would train on a GPU; throughput.py's own default, sized for a CPU, would leave it idle.
WORK = ("--set", "train.batch=64", "train.precision=bf16", "train.zero_stage=1", "--rounds", "7")
COMPARED = ("ours", "transformers", "compile, fused AdamW", "liger", "products")  # the variants of throughput.py
LARGEST_DIFFERENCE = 0.05  # between a compiled and an eager pass in bf16, relative, in each tensor's norm
TAIL = 4000  # characters of a job's output that are kept


@dataclass(frozen=True)
class Job:
    name: str
    command: list[str]
    seconds: int  # limit, and at the least what is kept for it
    results: Callable[[str], Any]  # from the output


def untimed(folder: Path) -> list[Job]:
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    tests = [sys.executable, "-m", "pytest", "-n", str(workers), "--timeout", str(TEST_SECONDS), *TESTS]
    return [Job("tests", tests, UNTIMED_SECONDS, last_line), *(mutual(folder, stage) for stage in (1, 3))]


def timed(folder: Path) -> list[Job]:
    python = sys.executable
    ops, throughput = folder / "ops.csv", folder / "throughput.csv"
    return [
        Job("ops", [python, "benchmarks/ops.py", "--rounds", "5", "--csv", str(ops)], 180, lambda _: rows(ops)),
        Job(
            "throughput",
            [python, "benchmarks/throughput.py", *WORK, "--csv", str(throughput), "--variants", *COMPARED],
            140,
            lambda _: rows(throughput),
        ),
        Job("compile", [python, "benchmarks/gpu.py", "--compile"], 90, lambda output: json.loads(last_line(output))),
    ]


def mutual(folder: Path, stage: int) -> Job:
    """The recipe as users start it, through DeepSpeed's launcher."""
    name = f"mutual-zero{stage}"
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    settings = ["train.precision=bf16", f"train.zero_stage={stage}", f"run.name={name}"]
    settings += ["train.steps=40", "optimizer.warmup=4", "evaluation.every=40"]
    settings += [f"run.folder={folder / 'runs'}", f"data.folder={folder / f'prepared-{stage}'}"]
    port = str(29600 + stage)
    command = [launcher, "--num_accelerators", "1", "--master_port", port, "recipes/mutual.py", *settings]
    return Job(name, command, UNTIMED_SECONDS, lambda _: learnt(folder / "runs" / name / "summary.json"))


def learnt(summary: Path) -> dict[str, Any]:
    """Returns what a run has learnt. Other jobs run beside it, so its times and energy mean nothing."""
    content = json.loads(summary.read_text())
    keys = ("name", "parameters", "validation_loss", "pairs_accuracy")
    students = [{key: student[key] for key in keys} for student in content["students"]]
    return {key: content[key] for key in ("device", "zero_stage", "steps", "tokens")} | {"students": students}


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file; raises ValueError where it has none."""
    with path.open(newline="") as file:
        content = list(csv.DictReader(file))
    if not content:
        raise ValueError(f"{path.name} has no rows")
    return content


def run(job: Job, limit: float) -> dict[str, Any]:
    """Runs a job, ends it with all its children after `limit` seconds, and returns what it has left in either case."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    begin, process = time.monotonic(), None
    with tempfile.TemporaryFile(
        "w+", encoding="utf-8", errors="replace"
    ) as output:  # A job may end within a character.
        try:
            process = subprocess.Popen(
                job.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            status = process.wait(limit)
            outcome = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"ended after its {limit:.0f} s"
        except OSError as error:
            outcome = f"could not begin: {error}"
        finally:
            if process is not None:
                with suppress(ProcessLookupError):  # A job that has ended may have left children behind.
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read()
    record = {"name": job.name, "outcome": outcome, "seconds": time.monotonic() - begin}
    try:
        record["results"] = job.results(text)
    except (OSError, ValueError, LookupError) as error:
        record["results"] = None
        record["outcome"] = f"{outcome}; no results: {error}" if outcome != "passed" else f"no results: {error}"
    if record["outcome"] != "passed":
        record["output"] = text[-TAIL:]
    return record


def machine() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory": device.total_memory,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "packages": versions,
        "commit": git_commit(),
    }


def compile_models() -> dict[str, dict[str, float | None]]:
    """Returns `compiled_beside_eager` of a student's body, by family."""
    from engine.models.gpt2 import GPT2Shape
    from engine.models.llama import LlamaShape

    size: dict[str, Any] = {"layers": 8, "hidden": 512, "heads": 8, "ffn": 1536, "vocab_size": 16000, "max_length": 512}
    shapes = {"llama": LlamaShape(**size, kv_heads=8), "gpt2": GPT2Shape(**size)}
    return {
        family: compiled_beside_eager(shape, torch.device("cuda"), torch.bfloat16, batch=8)
        for family, shape in shapes.items()
    }


def compiled_beside_eager(shape: Any, device: torch.device, dtype: torch.dtype, batch: int) -> dict[str, float | None]:
    """Compares a model's body, compiled as by `train.compile`, with the eager one.

    It returns the seconds of a forward and backward pass of `batch` whole sequences on the device and on its host, and
    the largest relative difference between their results. Raises ArithmeticError where that is too large.
    """
    from benchmarks import timing
    from engine.models.base import initial_weights
    from engine.models.compiled import compile_body
    from engine.models.families import new_model

    models = {"eager": new_model(shape), "compiled": new_model(shape)}
    for model in models.values():
        initial_weights(model, shape.layers, seed=0)
        model.to(device, dtype)
    compile_body(models["compiled"], learns=True)
    tokens_BL = torch.randint(shape.vocab_size, (batch, shape.max_length), device=device)
    cotangent_ND = torch.randn(tokens_BL.numel(), shape.hidden, device=device, dtype=dtype)

    def results(name: str) -> list[torch.Tensor]:
        hidden_ND, weights = models[name](tokens_BL), list(models[name].parameters())
        gradients = torch.autograd.grad(
            hidden_ND, weights, cotangent_ND, allow_unused=True
        )  # An untied head is not used.
        return [hidden_ND, *(g for g in gradients if g is not None)]

    differences = [
        ((a.float() - b.float()).norm() / b.float().norm()).item()
        for a, b in zip(results("compiled"), results("eager"), strict=True)
    ]
    if not max(differences) <= LARGEST_DIFFERENCE:
        raise ArithmeticError(f"compiled and eager differ by {max(differences):.1e}, over {LARGEST_DIFFERENCE}")
    variants = {name: timing.Variant(lambda _, name=name: results(name), lambda number: number) for name in models}
    clock = timing.clock_of(device)
    compared = timing.compare(variants, "eager", clock, rounds=15)
    return {
        "eager_seconds": compared.time("eager").median,
        "compiled_seconds": compared.time("compiled").median,
        **{f"{name}_host_seconds": timing.host_seconds(clock, variants[name].run) for name in models},
        "largest_difference": max(differences),
        "control_spread": compared.spread,
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), metavar="FILE")
    parser.add_argument("--compile", action="store_true", help="only torch.compile of models, its results as a line")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: make gpu needs a GPU, and torch sees none: run it on a machine that has one", file=sys.stderr)
        return 1
    if chosen.compile:
        print(json.dumps(compile_models()))
        return 0
    begin = time.monotonic() - (time.time() - psutil.Process().create_time())  # imports take seconds too
    record: dict[str, Any] = {**machine(), "jobs": []}

    def keep(result: dict[str, Any]) -> None:
        record["jobs"].append(result)
        record["seconds"] = time.monotonic() - begin
        chosen.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{result['name']:14}{result['seconds']:6.0f} s  {result['outcome']}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        side_by_side = untimed(Path(folder))
        with ThreadPoolExecutor(len(side_by_side)) as pool:
            for result in pool.map(lambda job: run(job, job.seconds), side_by_side):
                keep(result)
        one_by_one = timed(Path(folder))
        for number, job in enumerate(one_by_one, start=1):
            left = SECONDS - (time.monotonic() - begin)
            keep(run(job, max(1.0, left - sum(later.seconds for later in one_by_one[number:]))))
    print(f"{record['device']}: {chosen.out}")
    return 0 if all(job["outcome"] == "passed" for job in record["jobs"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
