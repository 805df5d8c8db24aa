"""One training step of several students that learn from one another: the engine's own loop beside its peers.

    python benchmarks/throughput.py --threads 2 --rounds 15 --csv throughput.csv
    python benchmarks/throughput.py --variants ours products
    python benchmarks/throughput.py --profile                 where the time of a step of ours goes

    ours                  `engine.train.accumulate` and `Cohort.step`, as `engine.train.train` calls them
    transformers          a plain loop (benchmarks/peers/transformers_mutual.py)
    compile               the same, models and loss under torch.compile
    compile, fused AdamW  the same, with torch's fused optimizer
    products              the matrix products that a step cannot do without, alone, at their own shapes

Every variant lives in a process of its own, so that memory is its own, and takes a step when told; one at a time, as
`benchmarks.timing` says. All start from the same weights and read the same data, and are timed only if the losses of
the first steps agree.

B sequences, L positions, N = B·L tokens, D hidden, H heads, V vocabulary, F inner width of the MLP, S students.
"""

import argparse
import csv
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing
from engine.config import ObjectiveConfig, OptimizerConfig, StudentConfig, TrainConfig
from engine.data import Step, TokenFile, TrainingData
from engine.flops import Text, training
from engine.models.families import parameter_count
from engine.models.llama import Llama, LlamaShape, initialise
from engine.objective import coefficients
from engine.runtime import device_name, git_commit

MEBIBYTE = 2**20
CHECKED_STEPS = 3
AGREEMENT = 1e-5  # of losses, relative
PROFILED_STEPS = 3
STUDENTS = (
    StudentConfig("a", layers=8, hidden=256, heads=8, ffn=768, seed=1),
    StudentConfig("b", layers=8, hidden=256, heads=4, ffn=768, seed=2),
    StudentConfig("c", layers=6, hidden=320, heads=8, ffn=768, seed=3),
)
OPTIMIZER = OptimizerConfig()
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a process in its group


@dataclass(frozen=True)
class Work:
    """What every variant does, step after step, in fp32."""

    tokens: Path  # uint16 ids
    students: tuple[StudentConfig, ...] = STUDENTS
    vocabulary: int = 16000
    length: int = 128
    batch: int = 8  # sequences a step
    zero_stage: int | str = "auto"  # of ours

    @property
    def student_tokens(self) -> int:
        """Tokens that students learn from in a step, summed over students."""
        return len(self.students) * self.batch * self.length

    def steps(self, device: torch.device) -> Iterator[Step]:
        """Without end, as the engine reads them."""
        data = TrainingData(
            TokenFile(self.tokens, "uint16", self.length),
            batch=self.batch,
            micro_batch=None,
            seed=0,
            random_offsets=False,
            rank=0,
            world=1,
            device=device,
        )
        return data.steps(1, sys.maxsize)


TakeStep = Callable[[], list[float]]  # one training step; returns each student's loss before it


def ours(work: Work) -> TakeStep:
    from engine import runtime
    from engine.cohort import Cohort, Student
    from engine.train import accumulate

    place = runtime.start()
    train = TrainConfig(zero_stage=work.zero_stage)  # pyright: ignore[reportArgumentType]
    students = [Student(config, work.vocabulary, train, OPTIMIZER, place, None) for config in work.students]
    cohort, steps = Cohort(students, place), work.steps(place.device)
    objective = coefficients(ObjectiveConfig(), len(cohort), place.device)
    learning_rates = [config.learning_rate for config in work.students]

    def take_step() -> list[float]:
        step = next(steps)
        tally = accumulate(cohort, step, objective)
        cohort.step(tally.losses_S, tally.ce_S, learning_rates, stop=False)
        return tally.losses_S.tolist()

    return take_step


def transformers(work: Work, *, compiled: bool = False, fused: bool | None = None) -> TakeStep:
    from benchmarks.peers.transformers_mutual import Loop

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = []
    for config in work.students:
        model = Llama(LlamaShape.of(config, work.vocabulary))
        initialise(model, config.seed)
        prefixed = {n if n.startswith("lm_head") else f"model.{n}": w for n, w in model.state_dict().items()}
        weights.append(prefixed)
    loop = Loop(work.students, weights, work.vocabulary, OPTIMIZER, device, compiled=compiled, fused=fused)
    steps = work.steps(device)

    def take_step() -> list[float]:
        (batch,) = next(steps).micro_batches
        return loop.step(batch.tokens_BL, batch.targets_N)

    return take_step


def products(work: Work) -> TakeStep:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    listed = [
        product
        for config in work.students
        for product in step_products(LlamaShape.of(config, work.vocabulary), work.batch, work.length, device)
    ]

    def take_step() -> list[float]:
        for left, right, out in listed:
            (torch.mm if out.ndim == 2 else torch.bmm)(left, right, out=out)
        return []

    return take_step


Product = tuple[Tensor, Tensor, Tensor]  # left [(b,) m, k], right [(b,) k, n], out [(b,) m, n]


def step_products(shape: LlamaShape, batch: int, length: int, device: torch.device) -> list[Product]:
    """The matrix products of one student's step, in its order, into tensors that exist already.

    Every linear layer: output, gradient of the input, gradient of the weight. Attention: scores and mix, and the four
    products of their gradients, of full squares, since no one product is a triangle. The head as a linear layer. Each
    weight and its gradient has memory of its own; activations of one shape share theirs, as a step finds what it has
    just written in the cache.
    """
    tokens, width = batch * length, shape.head_width
    buffers: dict[tuple[str, int], Tensor] = {}

    def activation(kind: str, columns: int) -> Tensor:
        if (kind, columns) not in buffers:
            buffers[kind, columns] = torch.randn(tokens, columns, device=device)
        return buffers[kind, columns]

    def linear(inputs: int, outputs: int) -> tuple[list[Product], list[Product]]:
        weight, d_weight = torch.randn(2, outputs, inputs, device=device)
        x, y = activation("value", inputs), activation("result", outputs)
        dx, dy = activation("d_result", inputs), activation("d_value", outputs)
        return [(x, weight.T, y)], [(dy, weight, dx), (dy.T, x, d_weight)]

    def attention() -> tuple[list[Product], list[Product]]:
        q, k, v, mixed, dq, dk, dv, d_mixed = torch.randn(8, batch * shape.heads, length, width, device=device)
        scores, p, dp, d_scores = torch.randn(4, batch * shape.heads, length, length, device=device)
        forward = [(q, k.mT, scores), (p, v, mixed)]
        return forward, [(p.mT, d_mixed, dv), (d_mixed, v.mT, dp), (d_scores, k, dq), (d_scores.mT, q, dk)]

    hidden, kv_hidden = shape.hidden, shape.kv_heads * width
    parts = []
    for _ in range(shape.layers):
        parts += [linear(hidden, hidden), linear(hidden, kv_hidden), linear(hidden, kv_hidden), attention()]
        parts += [linear(hidden, hidden), linear(hidden, shape.ffn), linear(hidden, shape.ffn)]
        parts += [linear(shape.ffn, hidden)]
    parts.append(linear(hidden, shape.vocabulary))
    forward = [product for part, _ in parts for product in part]
    return forward + [product for _, part in reversed(parts) for product in part]


@dataclass(frozen=True)
class Variant:
    build: Callable[[Work], TakeStep]
    imports: tuple[str, ...] = ()  # what it loads, whose memory is not its own


PEER = "benchmarks.peers.transformers_mutual"
COMPILER = "torch._inductor.compile_fx"
VARIANTS = {
    "ours": Variant(ours, ("engine.train",)),
    "transformers": Variant(transformers, (PEER,)),
    "compile": Variant(partial(transformers, compiled=True), (PEER, COMPILER)),
    "compile, fused AdamW": Variant(partial(transformers, compiled=True, fused=True), (PEER, COMPILER)),
    "products": Variant(products),
}


@dataclass(frozen=True)
class Report:
    """What a process says after a step."""

    seconds: float
    losses: list[float]  # of each student, nats per token
    peak: int  # bytes since the process was last told to forget: resident, or on a GPU torch's own
    imported: int  # bytes resident before anything was built; on a GPU 0


def serve(connection: Connection, name: str, work: Work) -> None:
    """A variant's process: builds it, then does what it is told, until it is told nothing more."""
    for key in PLACE:
        os.environ.pop(key, None)
    try:
        for module in VARIANTS[name].imports:
            importlib.import_module(module)
        imported = 0 if torch.cuda.is_available() else timing.resident_bytes("VmRSS")
        take_step = VARIANTS[name].build(work)
        while command := connection.recv():
            if command == "step":
                connection.send(step_report(take_step, imported))
            elif command == "profile":
                connection.send(profile(take_step))
            else:
                forget_peak()
                connection.send(None)
    except EOFError:
        return
    except Exception:
        connection.send(traceback.format_exc())


def step_report(take_step: TakeStep, imported: int) -> Report:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        losses = take_step()
        return Report(time.perf_counter() - begin, losses, timing.resident_bytes("VmHWM"), imported)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    losses = take_step()
    torch.cuda.synchronize()
    return Report(time.perf_counter() - begin, losses, torch.cuda.max_memory_allocated(), imported)


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        timing.reset_peak_resident()


def profile(take_step: TakeStep) -> str:
    """torch.profiler's table of the operations that took most time of their own, over a few steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            take_step()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60)


class Process:
    """A variant in a process of its own."""

    def __init__(self, name: str, work: Work) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, work), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, command: str) -> Any:
        """Waits for the answer. RuntimeError where the process failed, with its traceback."""
        try:
            self._connection.send(command)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise RuntimeError(f"{self.name}: its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, str) and command != "profile":
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def step(self) -> Report:
        return self.tell("step")

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()


@contextmanager
def processes(names: Sequence[str], work: Work) -> Iterator[dict[str, Process]]:
    with ExitStack() as stack:
        started = {}
        for name in names:  # one after the other is built, and takes its first step, before the next begins
            started[name] = Process(name, work)
            stack.callback(started[name].close)
        yield started


def check_losses(found: dict[str, Process]) -> None:
    """ValueError where a variant's losses of the first steps are not those of the first variant that has losses."""
    expected: tuple[str, list[list[float]]] | None = None
    for name, process in found.items():
        losses = [process.step().losses for _ in range(CHECKED_STEPS)]
        if not losses[0]:
            continue
        if expected is None:
            expected = name, losses
        difference = np.abs(np.array(losses) / np.array(expected[1]) - 1).max()
        if not difference <= AGREEMENT:
            raise ValueError(
                f"{name}'s losses {losses} differ from those of {expected[0]}, {expected[1]}, by {difference:.1e}: "
                f"expected at most {AGREEMENT}; they do not do the same work"
            )


@dataclass(frozen=True)
class Row:
    """What the table and the CSV hold of one variant. Of ratios and times: median, 20% and 80% quantiles."""

    variant: str
    milliseconds: float  # a step
    milliseconds_low: float
    milliseconds_high: float
    student_tokens_per_second: float
    ours_faster: float | None  # its time over that of ours
    ours_faster_low: float | None
    ours_faster_high: float | None
    over_products: float | None  # its time over that of the products alone
    peak_mebibytes: float
    beyond_state_mebibytes: float  # beyond imports, weights and moments
    gigaflops: float  # of a step's matrix products
    control_spread: float
    void: bool


def measure(names: Sequence[str], work: Work, rounds: int) -> list[Row]:
    shapes = [LlamaShape.of(config, work.vocabulary) for config in work.students]
    text = Text.whole(work.batch, work.length)
    gigaflops = sum(training(shape, text, explicit=True).hardware for shape in shapes) / 1e9
    state = 3 * 4 * sum(map(parameter_count, shapes))  # fp32 weights and both moments
    with processes(names, work) as found:
        check_losses(found)
        for process in found.values():
            process.tell("forget")
        last: dict[str, Report] = {}

        def clock(run: Callable[[Process], object], process: Process) -> float:
            report = last[process.name] = process.step()
            return report.seconds

        variants = {name: timing.Variant(Process.step, lambda _, p=process: p) for name, process in found.items()}
        compared = timing.compare(variants, names[0], clock, rounds=rounds)
    rows = []
    for name in names:
        seconds = compared.time(name)
        ratio = compared.ratio(name, "ours") if "ours" in names and name != "ours" else None
        report = last[name]
        rows.append(
            Row(
                variant=name,
                milliseconds=1000 * seconds.median,
                milliseconds_low=1000 * seconds.low,
                milliseconds_high=1000 * seconds.high,
                student_tokens_per_second=work.student_tokens / seconds.median,
                ours_faster=None if ratio is None else ratio.median,
                ours_faster_low=None if ratio is None else ratio.low,
                ours_faster_high=None if ratio is None else ratio.high,
                over_products=compared.ratio(name, "products").median if "products" in names else None,
                peak_mebibytes=report.peak / MEBIBYTE,
                beyond_state_mebibytes=(report.peak - report.imported - (state if report.losses else 0)) / MEBIBYTE,
                gigaflops=gigaflops,
                control_spread=compared.spread,
                void=compared.void,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    first = rows[0]
    state = f"{'VOID: ' if first.void else ''}control spreads over {first.control_spread:.1%}"
    lines = [
        f"A step's matrix products: {first.gigaflops:.1f} GFLOP; {state}",
        f"  {'':22}{'ms':>9}  {'20% to 80%':>17}  {'student tokens/s':>16}  {'÷ ours':>6}  {'20% to 80%':>12}"
        f"  {'÷ products':>10}  {'peak MiB':>8}  {'beyond state':>12}",
    ]
    for r in rows:
        tokens = f"{r.student_tokens_per_second:,.0f}" if r.variant != "products" else ""
        ratio = "" if r.ours_faster is None else f"{r.ours_faster:.2f}"
        ends = "" if r.ours_faster is None else f"{r.ours_faster_low:.2f} {r.ours_faster_high:.2f}"
        over = "" if r.over_products is None else f"{r.over_products:.2f}"
        lines.append(
            f"  {r.variant:22}{r.milliseconds:9.1f}  {r.milliseconds_low:8.1f} {r.milliseconds_high:8.1f}  {tokens:>16}"
            f"  {ratio:>6}  {ends:>12}  {over:>10}  {r.peak_mebibytes:8.0f}  {r.beyond_state_mebibytes:12.0f}"
        )
    return "\n".join(lines)


def random_tokens(path: Path, count: int, vocabulary: int) -> None:
    """Ids as frequent as words are (Zipf), so that embeddings are looked up, and their gradients added, as in text."""
    drawn = np.random.default_rng(0).zipf(1.2, count) % vocabulary
    drawn.astype(np.uint16).tofile(path)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    parser.add_argument("--vocabulary", type=int, default=Work.vocabulary)
    parser.add_argument("--length", type=int, default=Work.length, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=Work.batch, help="sequences a step")
    parser.add_argument("--zero-stage", default=Work.zero_stage, choices=("auto", "0", "1", "2", "3"), help="of ours")
    parser.add_argument("--profile", choices=VARIANTS, nargs="?", const="ours", help="this variant, and no timing")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    chosen = arguments(argv)
    if chosen.threads is not None:  # for the processes, which inherit it
        os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
        torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(
            Path(folder) / "tokens.bin",
            vocabulary=chosen.vocabulary,
            length=chosen.length,
            batch=chosen.batch,
            zero_stage=chosen.zero_stage if chosen.zero_stage == "auto" else int(chosen.zero_stage),
        )
        random_tokens(work.tokens, 1000 * work.batch * work.length, work.vocabulary)
        if chosen.profile:
            with processes([chosen.profile], work) as found:
                for _ in range(CHECKED_STEPS):
                    found[chosen.profile].step()
                print(found[chosen.profile].tell("profile"))
            return 0
        rows = measure(chosen.variants, work, chosen.rounds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{len(work.students)} students, V={work.vocabulary}, {work.batch} sequences of {work.length}, fp32; "
        f"{device_name(device)}, torch {torch.__version__}, {git_commit()}, {chosen.rounds} rounds"
    )
    print(table(rows))
    if chosen.csv is not None:
        with chosen.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
