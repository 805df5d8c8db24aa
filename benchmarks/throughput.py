"""Training steps per second: the loop that recipes run beside its peers, over a grid of configurations.

    python benchmarks/throughput.py                                       three students that learn from one another
    python benchmarks/throughput.py --task plain distil mutual --threads 2 --rounds 15 --csv throughput.csv
    python benchmarks/throughput.py --variants ours products --students 1 2 4 --set train.length=128,512
    deepspeed --num_accelerators 2 benchmarks/throughput.py --variants ours --set train.zero_stage=0,1,2,3
    python benchmarks/throughput.py --profile                             the operations that took most time

    ours                  `engine.train.train` itself, logging included, stopped between two steps (benchmarks/gate.py)
    transformers          a plain loop (benchmarks/peers/transformers_loop.py)
    compile               the same, models and loss under torch.compile
    compile, fused AdamW  the same, with torch's fused optimizer
    liger                 the plain loop on Liger's kernels, on a GPU
    trainer               Hugging Face's Trainer, as Baby Llama has it (benchmarks/peers/transformers_trainer.py)
    products              the matrix products that a step cannot do without, alone, at their own shapes

Every variant lives in a process of its own, so that memory is its own, and takes a step when told; one at a time, as
`benchmarks.timing` says. All variants of a configuration start from the same weights and read the same data, and are
timed only if the losses of the first steps agree. A variant that cannot do a configuration is left out, with a line; so
is one that fails, and the exit status is then 1.

Tasks: plain (S students, cross-entropy alone), distil (from K teachers), mutual. S students, K teachers, L positions, V
vocabulary.
"""

import argparse
import csv
import importlib
import importlib.util
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import timing
from benchmarks.cases import STUDENTS, TASKS, TEACHERS, Case, grid
from benchmarks.gate import PHASES, REST, Gate, Over, Report, engine_loop
from benchmarks.products import step_products
from engine.compute.flops import Flops, Workload, inference, training
from engine.data.batches import Step, TokenFile, TrainingData
from engine.data.prepare import prepare
from engine.models.base import Shape
from engine.models.families import parameter_count
from engine.models.huggingface import shape_of_folder
from engine.system.distributed import exit_process
from engine.system.errors import UserError
from engine.system.provenance import device_name, git_commit
from engine.teachers.teachers import STORAGE, folder_of

CPU = torch.device("cpu")
MEBIBYTE = 2**20
CHECKED_STEPS = 3
AGREEMENT = {"fp32": 1e-5, "bf16": 2e-2}  # of losses, relative
SPLIT_STEPS = 3
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def device() -> torch.device:
    """Returns this rank's device."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else CPU


# --- Variants: each takes a step whenever its gate lets it, until that raises Over -----------------------------------


def ours(case: Case, gate: Gate) -> None:
    try:
        engine_loop(case.config, gate)
    except Over:
        if ranks() > 1:
            exit_process()
        raise


def steps(case: Case) -> Iterator[Step]:
    """Yields the steps that the engine reads on one rank."""
    config = case.config
    prepared = prepare(config.data, log=lambda _: None)
    data = TrainingData(
        TokenFile(prepared.train, prepared.manifest["dtype"], config.train.length),
        batch=config.train.batch,
        micro_batch=None,
        seed=config.train.seed,
        random_offsets=config.train.chunks == "random",
        rank=0,
        world_size=1,
        device=device(),
    )
    return data.steps(1, sys.maxsize)


def transformers(case: Case, gate: Gate, **options: Any) -> None:
    from benchmarks.peers.transformers_loop import Loop

    loop = Loop(case.config, device(), **options)
    for step in gate.between(steps(case)):
        (batch,) = step.micro_batches
        gate.losses = loop.step(batch.tokens_BL, batch.targets_N)


def trainer(case: Case, gate: Gate) -> None:
    from benchmarks.peers.transformers_trainer import DistillationTrainer

    DistillationTrainer(case.config, device(), steps(case), gate).train()


def products(case: Case, gate: Gate) -> None:
    listed = []
    for shapes, backward in ((case.student_shapes, True), (teacher_shapes(case), False)):
        for shape in shapes:
            work, dtype = workload(case, ranks()), STORAGE[case.config.train.precision]
            listed += step_products(shape, work.sequences, work.length, device(), dtype, backward=backward)
    for _ in gate.between(iter(int, 1)):
        for left, right, out in listed:
            (torch.mm if out.ndim == 2 else torch.bmm)(left, right, out=out)


def teacher_shapes(case: Case) -> list[Shape]:
    return [shape_of_folder(folder_of(teacher), teacher.path) for teacher in case.config.teachers]


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def workload(case: Case, ranks: int = 1) -> Workload:
    """Returns what each of so many ranks reads in a step."""
    return Workload.whole(case.config.train.batch // ranks, case.config.train.length)


@dataclass(frozen=True)
class Variant:
    run: Callable[[Case, Gate], None]
    imports: tuple[str, ...] = ()  # modules that it loads, whose memory is not counted


LOOP, TRAINER = "benchmarks.peers.transformers_loop", "benchmarks.peers.transformers_trainer"
COMPILER = "torch._inductor.compile_fx"
VARIANTS = {
    "ours": Variant(ours, ("engine.train",)),
    "transformers": Variant(transformers, (LOOP,)),
    "compile": Variant(partial(transformers, compiled=True), (LOOP, COMPILER)),
    "compile, fused AdamW": Variant(partial(transformers, compiled=True, fused=True), (LOOP, COMPILER)),
    "liger": Variant(partial(transformers, fused=True, liger=True), (LOOP, "liger_kernel.transformers")),
    "trainer": Variant(trainer, (TRAINER,)),
    "products": Variant(products),
}


def why_not(name: str, case: Case) -> str | None:
    """Returns why the variant cannot do this configuration; None where it can."""
    config, train, objective = case.config, case.config.train, case.config.objective
    if name == "ours":
        return None
    if train.micro_batch is not None or train.recompute or config.cache is not None or config.masked:
        return "it takes whole batches of causal models, without cache or recomputation"
    if name == "products":
        llama = all(shape.family == "llama" for shape in (*case.student_shapes, *teacher_shapes(case)))
        return None if llama else "its products are listed for LLaMAs alone"
    if ranks() > 1:
        return "it runs on one rank"
    if objective.divergence != "forward" or objective.mix != "logits" or objective.weighted:
        return "it has forward divergences from equal peers and from the mean of the teachers' logits alone"
    if objective.reduction != "token" or objective.kl_everywhere or any(t.weight != 1 for t in config.teachers):
        return "it averages losses over tokens and logits over teachers"
    if name == "trainer" and len(config.students) > 1:
        return "it has one student"
    if name == "trainer" and importlib.util.find_spec("accelerate") is None:
        return "accelerate is not installed"
    if name == "liger" and not torch.cuda.is_available():
        return "its kernels need a GPU"
    return None


# --- Their processes --------------------------------------------------------------------------------------------------


def serve(connection: Connection, name: str, case: Case) -> None:
    """Builds a variant in this process, and obeys commands until the empty one."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # A run prints its progress.
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(device())
            for module in VARIANTS[name].imports:
                importlib.import_module(module)
            imported = 0 if torch.cuda.is_available() else timing.resident_bytes("VmRSS")
            VARIANTS[name].run(case, Gate(connection, imported))
        except (Over, EOFError):
            return
        except Exception:
            connection.send(traceback.format_exc())


class Process:
    """A variant in a process of its own. Under a launcher every rank has one, and they form a group."""

    def __init__(self, name: str, case: Case) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, case), daemon=True)
        with mock.patch.dict(os.environ, {"KERNELS_BACKEND": case.backend}):
            if ranks() > 1:  # The processes that command them form another group.
                os.environ["MASTER_PORT"] = str(_free_port())
            else:
                for key in LAUNCHER_VARIABLES:
                    os.environ.pop(key, None)
            self._process.start()
        theirs.close()

    def tell(self, command: str) -> Any:
        """Sends a command and returns the answer. Raises RuntimeError with the process's traceback where it failed."""
        try:
            self._connection.send(command)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise RuntimeError(f"{self.name}: its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, str) and command != "profile":
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def step(self, command: str = "step") -> Report:
        """Takes a step and returns the report of all ranks together.

        It has the slowest rank's time, the sum of the losses, the highest peak beyond imports and the mean split.
        """
        report = self.tell(command)
        if not dist.is_initialized():
            return report
        reports: list[Report] = [report] * dist.get_world_size()
        dist.all_gather_object(reports, report)  # So no rank begins another variant's step before all have ended this.
        split: Counter[str] = Counter()
        for rank_report in reports:
            split.update({phase: seconds / len(reports) for phase, seconds in rank_report.split.items()})
        highest = max(reports, key=lambda rank_report: rank_report.peak - rank_report.imported)
        return Report(
            max(rank_report.seconds for rank_report in reports),
            np.sum([rank_report.losses for rank_report in reports], axis=0).tolist(),
            highest.peak,
            highest.imported,
            dict(split),
            report.communicated,
        )

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()


def _free_port() -> int:
    """Returns a free port of rank 0's node, the same on all ranks."""
    with socket.socket() as server:
        server.bind(("", 0))
        port = [server.getsockname()[1]]
    dist.broadcast_object_list(port)
    return port[0]


Key = tuple[Case, str]  # a configuration and a variant


@contextmanager
def processes(keys: Sequence[Key]) -> Iterator[dict[Key, Process]]:
    with ExitStack() as stack:
        started = {}
        for case, name in keys:
            started[case, name] = Process(name, case)
            stack.callback(started[case, name].close)
        yield started


def refusals(variants: Mapping[str, Process], agreement: float) -> dict[str, str]:
    """Returns why variants are not to be timed: they fail, or the losses of their first steps differ from the first
    variant's.

    Raises RuntimeError where the first one fails, or any where there are several ranks: the others would wait for it.
    """
    expected: tuple[str, list[list[float]]] | None = None
    refused = {}
    for name, process in variants.items():
        try:
            losses = [process.step().losses for _ in range(CHECKED_STEPS)]
        except RuntimeError as error:
            if ranks() > 1 or process is next(iter(variants.values())):
                raise
            refused[name] = str(error).strip().splitlines()[-1]
            continue
        if not losses[0]:
            continue
        expected = expected or (name, losses)
        difference = np.abs(np.array(losses) / np.array(expected[1]) - 1).max()
        if not difference <= agreement:
            refused[name] = (
                f"its losses {losses} differ from those of {expected[0]}, {expected[1]}, by {difference:.1e}: "
                f"expected at most {agreement}; they do not do the same work"
            )
    return refused


# --- Measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What the table and the CSV hold of one variant of a configuration.

    Times and ratios are medians, with the 20% and 80% quantiles as low and high. What a variant does not have is "".
    """

    task: str
    students: int
    teachers: int
    student_shapes: str
    teacher_shapes: str
    vocab_size: int
    length: int
    batch: int  # sequences of a step, over all ranks
    ranks: int
    zero_stage: int
    precision: str
    backend: str
    divergence: str
    overrides: str
    variant: str
    milliseconds: float  # of a step
    milliseconds_low: float
    milliseconds_high: float
    tokens_per_second: float  # of the text, which is every student's own speed
    student_tokens_per_second: float  # summed over students
    ours_faster: float | str  # its time over that of ours
    ours_faster_low: float | str
    ours_faster_high: float | str
    over_products: float | str  # its time over that of the products alone
    peak_mebibytes: float  # of a rank
    beyond_state_mebibytes: float  # beyond imports, students' weights and moments, and teachers' weights
    gigaflops: float  # hardware FLOPs of a step's matrix products, over all ranks
    model_gigaflops: float
    communicated_mebibytes: float | str  # tensors that a rank gave to collectives in a step
    data: float | str  # milliseconds by phase (benchmarks.gate), of steps that were split
    teachers_forward: float | str
    bodies: float | str
    loss: float | str
    backward: float | str
    optimizer: float | str
    communication: float | str
    waiting: float | str
    outer: float | str
    record: float | str
    rest: float | str
    control_spread: float
    void: bool
    device: str
    commit: str
    rounds: int


def measure(keys: Sequence[Key], rounds: int) -> tuple[dict[Key, Row], dict[Key, str]]:
    """Returns the rows of all that were measured, interleaved with one another, and why others were not."""
    cases = list(dict.fromkeys(case for case, _ in keys))
    with processes(keys) as running:
        refused: dict[Key, str] = {}
        for case in cases:
            same = {name: process for (other, name), process in running.items() if other is case}
            for name, reason in refusals(same, AGREEMENT[case.config.train.precision]).items():
                refused[case, name] = reason
                running.pop((case, name)).close()
        keys = list(running)
        for process in running.values():
            process.tell("forget")
        last: dict[int, Report] = {}

        def clock(run: Callable[[Process], object], process: Process) -> float:
            report = last[id(process)] = process.step()
            return report.seconds

        labels = {key: f"{cases.index(key[0])} {key[1]}" for key in keys}
        variants = {labels[key]: timing.Variant(Process.step, lambda _, p=p: p) for key, p in running.items()}
        compared = timing.compare(variants, labels[keys[0]], clock, rounds=rounds, sample_seconds=0.0)
        reports = {key: last[id(process)] for key, process in running.items()}
        split = {
            key: [process.step("split") for _ in range(SPLIT_STEPS)]
            for key, process in running.items()
            if key[1] == "ours"
        }
    return {key: _row(key, labels, compared, reports[key], split.get(key, []), rounds) for key in keys}, refused


def _row(
    key: Key,
    labels: Mapping[Key, str],
    compared: timing.Comparison,
    report: Report,
    split: Sequence[Report],
    rounds: int,
) -> Row:
    case, name = key
    config, train, shapes, teachers = case.config, case.config.train, case.student_shapes, teacher_shapes(case)
    seconds, world_size, tokens = compared.time(labels[key]), ranks(), train.batch * train.length
    ratio = compared.ratio(labels[key], labels[case, "ours"]) if name != "ours" and (case, "ours") in labels else None
    over = compared.ratio(labels[key], labels[case, "products"]).median if (case, "products") in labels else ""
    flops = flops_of(case)
    phases = {p: 1000 * median(report.split[p] for report in split) if split else "" for p in (*PHASES, REST)}
    peak = report.peak - report.imported
    return Row(
        task=case.task,
        students=len(shapes),
        teachers=len(teachers),
        student_shapes=" ".join(map(described, shapes)),
        teacher_shapes=" ".join(map(described, teachers)),
        vocab_size=case.vocab_size,
        length=train.length,
        batch=train.batch,
        ranks=world_size,
        zero_stage=train.stage(world_size),
        precision=train.precision,
        backend=case.backend,
        divergence=config.objective.divergence,
        overrides=" ".join(case.overrides),
        variant=name,
        milliseconds=1000 * seconds.median,
        milliseconds_low=1000 * seconds.low,
        milliseconds_high=1000 * seconds.high,
        tokens_per_second=tokens / seconds.median,
        student_tokens_per_second=len(shapes) * tokens / seconds.median,
        ours_faster="" if ratio is None else ratio.median,
        ours_faster_low="" if ratio is None else ratio.low,
        ours_faster_high="" if ratio is None else ratio.high,
        over_products=over,
        peak_mebibytes=report.peak / MEBIBYTE,
        beyond_state_mebibytes=(peak - (state_bytes(case) if report.losses else 0)) / MEBIBYTE,
        gigaflops=flops.hardware / 1e9,
        model_gigaflops=flops.model / 1e9,
        communicated_mebibytes=median(report.communicated for report in split) / MEBIBYTE if split else "",
        teachers_forward=phases.pop("teachers"),
        **phases,  # pyright: ignore[reportArgumentType]
        control_spread=compared.spread,
        void=compared.void,
        device=device_name(device()),
        commit=git_commit(),
        rounds=rounds,
    )


def flops_of(case: Case) -> Flops:
    """Returns the FLOPs of a step on all ranks, without the outer loop; with a cache only the teachers' heads count."""
    work, recompute = workload(case), case.config.train.recompute
    students = sum((training(shape, work, recompute=recompute) for shape in case.student_shapes), Flops())
    read = work if case.config.cache is None else replace(work, sequences=0)
    return sum((inference(shape, read) for shape in teacher_shapes(case)), students)


def state_bytes(case: Case) -> float:
    """Returns the bytes that a rank holds between two steps: students' weights and moments, and teachers' weights."""
    train, world_size = case.config.train, ranks()
    storage, stage = STORAGE[train.precision].itemsize, train.stage(world_size)
    per_parameter = storage / (world_size if stage == 3 else 1) + 8 / (world_size if stage > 0 else 1)
    per_parameter += 4 / world_size if train.precision == "bf16" else 0  # the fp32 weights
    students, teachers = (sum(map(parameter_count, shapes)) for shapes in (case.student_shapes, teacher_shapes(case)))
    return per_parameter * students + storage * teachers


def described(shape: Shape) -> str:
    kv_heads = shape.kv_hidden // shape.head_width
    narrow = f"x{kv_heads}" if kv_heads < shape.heads else ""
    untied = "" if shape.tied else "-untied"
    return f"{shape.family}-{shape.layers}x{shape.hidden}x{shape.heads}x{shape.ffn}{narrow}{untied}"


def table(case: Case, rows: Sequence[Row]) -> str:
    """Returns the table of one configuration."""
    first = rows[0]
    state = f"{'VOID: ' if first.void else ''}control spreads over {first.control_spread:.1%}"
    lines = [
        f"{case}; {first.ranks} rank(s), ZeRO {first.zero_stage}; {first.gigaflops:.1f} GFLOP a step; {state}",
        f"  {'':22}{'ms':>9}  {'20% to 80%':>17}  {'student tokens/s':>16}  {'÷ ours':>6}  {'20% to 80%':>12}"
        f"  {'÷ products':>10}  {'peak MiB':>8}  {'beyond state':>12}",
    ]
    for r in rows:
        tokens = f"{r.student_tokens_per_second:,.0f}" if r.variant != "products" else ""
        ratio = "" if r.ours_faster == "" else f"{r.ours_faster:.2f}"
        ends = "" if r.ours_faster == "" else f"{r.ours_faster_low:.2f} {r.ours_faster_high:.2f}"
        over = "" if r.over_products == "" else f"{r.over_products:.2f}"
        lines.append(
            f"  {r.variant:22}{r.milliseconds:9.1f}  {r.milliseconds_low:8.1f} {r.milliseconds_high:8.1f}  {tokens:>16}"
            f"  {ratio:>6}  {ends:>12}  {over:>10}  {r.peak_mebibytes:8.0f}  {r.beyond_state_mebibytes:12.0f}"
        )
        if r.variant == "ours":
            names = (*(("teachers_forward" if p == "teachers" else p) for p in PHASES), REST)
            parts = {name: float(getattr(r, name)) for name in names}
            whole = sum(parts.values())
            shares = ", ".join(f"{name.split('_')[0]} {part / whole:.1%}" for name, part in parts.items() if part)
            lines.append(f"    of {whole:.1f} ms with a wait at each seam: {shares}")
    return "\n".join(lines)


# --- The command ------------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["mutual"])
    parser.add_argument("--students", nargs="+", type=int, default=[], metavar="S", help="default: 3 if mutual, else 1")
    parser.add_argument("--teachers", nargs="+", type=int, default=[], metavar="K", help="default: 2 if distil, else 0")
    parser.add_argument("--vocab-size", nargs="+", type=int, default=[16000], metavar="V")
    parser.add_argument("--backend", nargs="+", default=["auto"], help="backends of the kernels")
    parser.add_argument("--shape", nargs="+", default=STUDENTS, help="students' shapes or presets, taken in turn")
    parser.add_argument("--teacher-shape", nargs="+", default=TEACHERS, help="teachers', likewise")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE[,VALUE]", help="settings as recipes have them, and a grid"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="CPU threads of a rank; default: torch's own choice")
    parser.add_argument(
        "--interleave", action="store_true", help="measure all configurations at once, not one after another"
    )
    parser.add_argument(
        "--profile", choices=VARIANTS, nargs="?", const="ours", help="profile this variant in place of timing"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each configuration and variant")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher's
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    threads = options.threads
    if threads is None and ranks() > 1 and "OMP_NUM_THREADS" not in os.environ:  # The engine divides them so.
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", ranks())))
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    if ranks() > 1:
        dist.init_process_group("gloo")
    first = int(os.environ.get("RANK", "0")) == 0
    with tempfile.TemporaryDirectory() as folder:
        shared_folder = [folder]
        if dist.is_initialized():
            dist.broadcast_object_list(shared_folder)  # With several nodes TMPDIR must be where all see it.
        make_cases = partial(
            grid,
            Path(shared_folder[0]),
            *(options.task, options.students, options.teachers, options.vocab_size, options.backend, options.set),
            shapes=options.shape,
            teacher_shapes=options.teacher_shape,
        )
        try:
            if first:
                cases = list(make_cases())
            if dist.is_initialized():
                dist.barrier()
            cases = list(make_cases())  # The other ranks find the files written.
            return profile(cases, options.profile) if options.profile else compare(cases, options, first)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            if dist.is_initialized():
                dist.barrier()  # All have ended before the folder is removed.


def profile(cases: Sequence[Case], name: str) -> int:
    for case in cases:
        with processes([(case, name)]) as running:
            (process,) = running.values()
            for _ in range(CHECKED_STEPS):
                process.step()
            print(f"{case}\n{process.tell('profile')}")
    return 0


def compare(cases: Sequence[Case], options: argparse.Namespace, first: bool) -> int:
    groups: list[list[Key]] = []
    for case in cases:
        if any(teacher.context == "stream" for teacher in case.config.teachers):
            raise UserError("teachers.context=stream: only teachers that read the students' chunks are measured here")
        groups.append([])
        for name in options.variants:
            reason = why_not(name, case)
            if reason is None:
                groups[-1].append((case, name))
            elif first:
                print(f"{case}: no {name}: {reason}", flush=True)
    if options.interleave:
        groups = [[key for group in groups for key in group]]
    with ExitStack() as stack:
        file = stack.enter_context(options.csv.open("w", newline="")) if options.csv is not None and first else None
        writer = None if file is None else csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if writer is not None:
            writer.writeheader()
        complete = True
        for group in filter(None, groups):
            rows, refused = measure(group, options.rounds)
            complete &= not refused
            if not first:
                continue
            if file is not None and writer is not None:
                writer.writerows(asdict(row) for row in rows.values())
                file.flush()
            first_row = next(iter(rows.values()))
            print(f"{first_row.device}, torch {torch.__version__}, {first_row.commit}, {options.rounds} rounds")
            for case in dict.fromkeys(case for case, _ in group):
                print(table(case, [row for (other, _), row in rows.items() if other is case]), flush=True)
                for name in (name for other, name in refused if other is case):
                    print(f"  not timed: {name}: {refused[case, name]}", flush=True)
    return 0 if complete else 1


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
