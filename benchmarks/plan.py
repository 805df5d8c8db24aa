"""Predicts a step's time and memory on a cluster, and the fastest ZeRO stage among those that fit.

    python benchmarks/plan.py --measured plain.csv mutual.csv             rates of this machine, and the plan's error
    python benchmarks/plan.py recipes/baby_llama/student-58m.yaml --device H100 --nodes 4 --gpus 8
    python benchmarks/plan.py my.yaml --measured gpu.csv --device measured                 by the rates found there
    python benchmarks/plan.py --figure plan.png                           the papers' recipes on 8 to 1,024 GPUs

A rank's step takes

    FLOPs / rate + bytes / rate + passes · seconds
    + Σ (volume · (g−1)/g / within + volume · (n−1)/n / between + seconds · log₂ ranks)

FLOPs are those of matrix products as they are computed (engine.compute.flops). Bytes are what everything else, and
AdamW, must move, as counted for the kernels (benchmarks.traffic). Passes are those of a model's layers, each of which
costs its launches whatever its size. For collectives over n nodes of g GPUs, a volume is what a reduce-scatter or an
all-gather moves; an all-reduce moves it twice. Nothing overlaps, as in the engine.

The rates are fitted to what benchmarks/throughput.py has measured (its --csv), and each case's error is that of a fit
without this case. Without measurements a device has the rates in ASSUMED, which are a guess, and so is the plan.
Whatever is printed here is predicted.

S students, K teachers, R streams, D hidden, F inner width, V vocabulary, P parameters.
"""

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np

from engine.compute.flops import Workload, inference, training
from engine.compute.hardware import listed_peak
from engine.compute.memory import peak_memory as estimated_memory
from engine.config.loading import build, read_yaml
from engine.config.settings import Config
from engine.data.masking import PREDICTED_SHARE
from engine.models.base import Shape
from engine.models.families import parameter_count, shape_of
from engine.models.llama import LlamaShape
from engine.run.dry_run import teacher_shape
from engine.students.zero import LARGEST_BUCKET
from engine.system.errors import UserError

RATES = ("flops", "bytes", "passes", "moved", "collectives")  # the quantities of a rank's step
# Share of the peak in products, share of the memory's bandwidth, seconds of a layer's pass, seconds of a collective.
ASSUMED = (0.4, 0.9, 1e-4, 2e-5)
BANDWIDTH = {"A100": 2.04e12, "H100": 3.35e12, "B200": 8.0e12, "MI300X": 5.3e12}  # bytes/s, as in benchmarks/audit.py
MEMORY = {"A100": 80e9, "H100": 80e9, "B200": 180e9, "MI300X": 192e9}  # bytes
STAGES = range(4)
PAPERS = ("baby_llama/student-58m.yaml", "baby_llama_2/student.yaml", "babies/published.yaml")
GPUS = tuple(2**n for n in range(3, 11))
SEQUENCES = 1024  # in a step over all GPUs, where this number is held constant


@dataclass(frozen=True)
class Job:
    """What a step has to do, over all ranks."""

    students: tuple[Shape, ...]
    teachers: tuple[Shape, ...]
    batch: int  # sequences
    length: int
    precision: str = "fp32"
    micro_batch: int | None = None  # sequences that a rank takes at once; None is all of its share
    streams: int | None = None  # R; None is one per student, and one for all teachers
    recompute: bool = False


@dataclass(frozen=True)
class Cluster:
    """n nodes of g GPUs (or ranks) each; bandwidths are in bytes per second."""

    nodes: int = 1
    gpus: int = 1
    within: float = 450e9  # from a GPU to the others of its node
    between: float = 400e9  # from a node to the others: 8 cards of 400 Gbit/s
    memory: float = math.inf  # of a GPU, bytes
    kind: str = "cuda"

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Plan:
    """The prediction for a ZeRO stage."""

    stage: int
    micro_batch: int
    seconds: float  # of a step
    communication: float  # seconds of the step that are communication
    memory: float  # bytes of a rank
    fits: bool


def quantities(job: Job, cluster: Cluster, stage: int) -> np.ndarray:
    """Returns the quantities of a rank's step: FLOPs, bytes, passes, seconds of the volume moved, collectives."""
    share, storage = job.batch / cluster.ranks, 2 if job.precision == "bf16" else 4
    micro_batches = 1 if job.micro_batch is None else share / job.micro_batch
    flops, moved, volume, passes, collectives = 0, 0.0, 0.0, 0.0, 1.0
    for shape in (*job.students, *job.teachers):
        learns, work = shape in job.students, workload_of(shape, share, job.length)
        cost = training(shape, work, recompute=job.recompute) if learns else inference(shape, work)
        flops += cost.hardware
        elements = sum(elementwise(shape)[: 2 if learns else 1]) + (elementwise(shape)[0] if job.recompute else 0)
        moved += storage * work.sequences * work.length * shape.layers * elements
        passes += micro_batches * shape.layers * (2 + job.recompute if learns else 1)
    rows = workload_of(job.students[0], share, job.length).rows
    R = job.streams or len(job.students) + bool(job.teachers)
    moved += 4 * rows * job.students[0].vocab_size * (2 * R + len(job.students))
    for shape in job.students:
        P = parameters(shape)
        moved += optimizer_bytes(job.precision) * P / (cluster.ranks if stage > 0 else 1)
        if cluster.ranks > 1:
            volume += storage * P * sum(volumes(P, stage, micro_batches))
            collectives += {0: 1, 1: 2, 2: 2, 3: 2 * shape.layers * micro_batches}[stage]
    g, n = cluster.gpus, cluster.nodes
    seconds = volume * ((g - 1) / g / cluster.within + (n - 1) / n / cluster.between)
    collectives *= math.ceil(math.log2(cluster.ranks)) if cluster.ranks > 1 else 0
    return np.array([flops, moved, passes, seconds, collectives], dtype=np.float64)


def volumes(P: int, stage: int, micro_batches: float) -> tuple[float, float]:
    """Returns how often all gradients are reduced, and how often all parameters are gathered.

    DeepSpeed reduces a bucket for all ranks at stages 1 and 2 too. At stage 3 every micro-batch gathers again.
    """
    gathers = micro_batches * (1 if P <= LARGEST_BUCKET else 2)
    return (2.0, 0.0) if stage == 0 else (2.0, 1.0) if stage < 3 else (micro_batches, gathers)


def elementwise(shape: Shape) -> tuple[int, int]:
    """Returns the least elements per token and layer that operations other than products move, forward and backward.

    They are two norms with residuals (2 in and 2 out), rotary positions, the activation and attention's own tensors.
    """
    D, F, kv = shape.hidden, shape.ffn, shape.kv_hidden
    rotary = 2 * (D + kv) if isinstance(shape, LlamaShape) else 0
    forward, backward = (3 * F, 5 * F) if isinstance(shape, LlamaShape) else (2 * F, 3 * F)  # of the activation
    return 8 * D + rotary + forward + 2 * (D + kv), 8 * D + rotary + backward + 4 * (D + kv)


def optimizer_bytes(precision: str) -> int:
    """Returns the bytes that an update moves per parameter.

    The weight, both moments and the gradient are read, and the first three are written. The gradient is read once more
    for its norm, and set to zero. In bf16, fp32 weights are kept too.
    """
    return 28 + 4 + 4 if precision == "fp32" else 28 + 4 + 3 * 2


def workload_of(shape: Shape, sequences: float, length: int) -> Workload:
    """Returns the workload of a number of sequences, which need not be whole; a masked model predicts few tokens."""
    tokens = round(sequences * length)
    rows = tokens if shape.causal else round(tokens * PREDICTED_SHARE)
    return Workload(tokens // length, length, rows, rows, tokens)


@cache
def parameters(shape: Shape) -> int:
    return parameter_count(shape)


def memory(job: Job, cluster: Cluster, stage: int) -> float:
    """Returns the bytes of a rank at its peak as the dry run does, without the allocator's and libraries' own."""
    students = {str(i): shape for i, shape in enumerate(job.students)}
    teachers = {str(i): shape for i, shape in enumerate(job.teachers)}
    plain = {"name": "s", "layers": 1, "hidden": 2, "heads": 1, "ffn": 1}
    train = {"precision": job.precision, "recompute": job.recompute, "length": job.length, "batch": job.batch}
    mix = "each" if job.streams and job.streams > len(students) + 1 else "logits"
    config = build(Config, {"students": [plain], "train": train, "objective": {"mix": mix}})
    tokens = (job.micro_batch or math.ceil(job.batch / cluster.ranks)) * job.length
    return estimated_memory(config, students, teachers, tokens, cluster.ranks, stage, cluster.kind)


def plans(job: Job, cluster: Cluster, rates: np.ndarray) -> list[Plan]:
    """Returns a plan per stage, with the largest micro-batch that fits, or the smallest where none does."""
    stage_plans, share = [], max(1, job.batch // cluster.ranks)
    for stage in STAGES:
        if job.precision == "bf16" and stage == 0:  # engine.run.check_settings refuses it.
            continue
        for micro in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
            small = replace(job, micro_batch=micro)
            needed = memory(small, cluster, stage)
            if needed <= cluster.memory or micro == 1:
                parts = quantities(small, cluster, stage) * rates
                stage_plans.append(
                    Plan(stage, micro, parts.sum(), parts[3:].sum(), needed, fits=needed <= cluster.memory)
                )
                break
    return stage_plans


def best(stage_plans: Sequence[Plan]) -> Plan:
    """Returns the fastest plan among those that fit; among equals that of the lowest stage."""
    return min(stage_plans, key=lambda plan: (not plan.fits, plan.seconds, plan.stage))


# --- Rates ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A case that benchmarks/throughput.py has measured."""

    name: str
    job: Job
    cluster: Cluster
    stage: int
    seconds: float
    memory: float  # bytes beyond imports


def read_measured(paths: Iterable[Path]) -> list[Measured]:
    """Returns the rows of `ours`, without those of noisy minutes and those with an outer loop, which no plan knows.

    Raises UserError where they come from several devices or are of several precisions.
    """
    rows = [row for path in paths for row in csv.DictReader(path.open(newline="")) if row["variant"] == "ours"]
    kept = [row for row in rows if row["void"] == "False" and "outer" not in row["overrides"]]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} cases are left out: void, or with an outer loop")
    devices = sorted({row["device"] for row in kept})
    if len(devices) != 1:
        raise UserError(f"measured on {' and '.join(devices) or 'nothing'}: give one device's files")
    precisions = sorted({row["precision"] for row in kept})
    if len(precisions) > 1:
        raise UserError(f"measured in {' and '.join(precisions)}: give the files of one precision")
    return [_measured(row) for row in kept]


def _measured(row: Mapping[str, str]) -> Measured:
    vocab_size, length, ranks = (int(row[key]) for key in ("vocabulary", "length", "ranks"))
    settings = {key: value for key, _, value in (part.partition("=") for part in row["overrides"].split())}
    micro = settings.get("train.micro_batch")
    job = Job(
        tuple(parse(text, vocab_size, length) for text in row["student_shapes"].split()),
        tuple(parse(text, vocab_size, length) for text in row["teacher_shapes"].split()),
        int(row["batch"]),
        length,
        row["precision"],
        None if micro is None else int(micro),
        int(row["students"]) + int(row["teachers"]) if settings.get("objective.mix") == "each" else None,
        settings.get("train.recompute") == "true",
    )
    kind = "cpu" if "threads a rank" in row["device"] else "cuda"
    cluster = Cluster(1, ranks, within=1.0, between=1.0, kind=kind)  # The fit finds seconds per byte.
    memory = float(row["beyond_state_mebibytes"]) * 2**20 + state(job, ranks, int(row["zero_stage"]))
    name = f"{row['task']} S={row['students']} K={row['teachers']} V={vocab_size} L={length} B={row['batch']}"
    name += f", {ranks} ranks, ZeRO {row['zero_stage']}" if ranks > 1 else ""
    return Measured(name, job, cluster, int(row["zero_stage"]), float(row["milliseconds"]) / 1000, memory)


def parse(text: str, vocab_size: int, length: int) -> Shape:
    """Returns the shape of throughput.py's description, such as llama-8x256x8x768 or llama-32x960x15x2560x5-untied."""
    family, sizes, *untied = text.split("-")
    names = ("layers", "hidden", "heads", "ffn", "kv_heads")
    settings = dict(zip(names, map(int, sizes.split("x")), strict=False))
    student = {"name": "s", "family": family, **settings, "max_length": length, "tied": not untied}
    (config,) = build(Config, {"students": [student]}).students
    return shape_of(config, vocab_size)


def state(job: Job, ranks: int, stage: int) -> float:
    """Returns the bytes of weights and moments that throughput.py subtracts."""
    storage = 2 if job.precision == "bf16" else 4
    per_parameter = storage / (ranks if stage == 3 else 1) + 8 / (ranks if stage > 0 else 1)
    per_parameter += 4 / ranks if job.precision == "bf16" else 0
    return per_parameter * sum(map(parameters, job.students)) + storage * sum(map(parameters, job.teachers))


def fit(cases: Sequence[Measured]) -> np.ndarray:
    """Returns the seconds of one unit of each quantity, none below 0, by least squares of relative errors."""
    table = np.array([quantities(c.job, c.cluster, c.stage) / c.seconds for c in cases])
    rates, error = np.zeros(table.shape[1]), math.inf
    for size in range(1, table.shape[1] + 1):
        for chosen in itertools.combinations(range(table.shape[1]), size):
            part = table[:, chosen]
            scale = part.max(axis=0)
            if (scale == 0).any() or len(chosen) > len(cases):
                continue
            solved = np.linalg.lstsq(part / scale, np.ones(len(cases)), rcond=None)[0] / scale
            squares = float(((part @ solved - 1) ** 2).sum())
            if (solved >= 0).all() and squares < error - 1e-12:
                rates, error = np.zeros(table.shape[1]), squares
                rates[list(chosen)] = solved
    return rates


def errors(cases: Sequence[Measured]) -> list[float]:
    """Returns the relative error of each case's time as predicted from the other cases."""
    relative = []
    for i, case in enumerate(cases):
        rates = fit([*cases[:i], *cases[i + 1 :]])
        relative.append(float(quantities(case.job, case.cluster, case.stage) @ rates) / case.seconds - 1)
    return relative


def of_machine(cases: Sequence[Measured], cluster: Cluster) -> tuple[Cluster, np.ndarray]:
    """Returns a cluster of the measured machine, and its rates; what no case says of the network is as given."""
    rates = fit(cases)
    within = cluster.within if rates[3] == 0 else 1 / rates[3]
    seconds = rates[4] or ASSUMED[3]
    return replace(cluster, within=within, kind=cases[0].cluster.kind), np.array([*rates[:3], 1.0, seconds])


def assumed(device: str, precision: str) -> np.ndarray:
    """Returns the seconds of one unit of each quantity on a GPU that has not been measured."""
    peak = listed_peak(device, precision)
    if device not in BANDWIDTH or peak is None:
        raise UserError(f"--device {device}: expected one of {', '.join(BANDWIDTH)}")
    peak_share, bandwidth_share, pass_seconds, collective_seconds = ASSUMED
    flops, moved = 1 / (peak_share * peak), 1 / (bandwidth_share * BANDWIDTH[device])
    return np.array([flops, moved, pass_seconds, 1.0, collective_seconds])


def rates_of(job: Job, rates: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the rates in the job's precision; UserError where there are none."""
    if job.precision not in rates:
        raise UserError(f"train.precision={job.precision}: measured in {', '.join(rates)} alone; measure that too")
    return rates[job.precision]


# --- Recipes ----------------------------------------------------------------------------------------------------------


def job_of(recipe: Path) -> Job:
    """Returns a recipe's step. Teachers that are not trained yet have the shapes of the recipes beside it."""
    config = build(Config, read_yaml(recipe))
    vocab_size = config.data.tokenizer.vocab_size or 16000
    train, K = config.train, range(len(config.teachers))
    if config.cache is not None or any(teacher.context == "stream" for teacher in config.teachers):
        raise UserError(f"{recipe}: its teachers have a cache or windows of their own; only others can be planned")
    teachers = tuple(teacher_shape(config, i, vocab_size, recipe.parent) for i in K)
    streams = len(config.students) + (len(K) if config.objective.mix == "each" else bool(K))
    return Job(
        tuple(shape_of(student, vocab_size) for student in config.students),
        teachers,
        train.batch,
        train.length,
        train.precision,
        train.micro_batch,
        streams,
        train.recompute,
    )


def figure(path: Path, recipes: Sequence[Path], cluster: Cluster, rates: Mapping[str, np.ndarray], about: str) -> None:
    """Draws tokens per second over the number of GPUs, each with the recipe's batch or all with SEQUENCES together."""
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 3, figsize=(15, 4.6))
    for recipe in recipes:
        job, name = job_of(recipe), f"{recipe.parent.name}/{recipe.stem}"
        for axis, held in zip(axes[:2], (None, SEQUENCES), strict=True):
            points = []
            for gpus in GPUS:
                sized = replace(job, batch=held or job.batch * gpus)
                larger = replace(cluster, nodes=gpus // cluster.gpus)
                points.append((gpus, sized, best(plans(sized, larger, rates_of(job, rates)))))
            speeds = [sized.batch * sized.length / plan.seconds for _, sized, plan in points]
            (line,) = axis.plot(GPUS, speeds, marker="o", label=name)
            first = speeds[0] / GPUS[0]
            axis.plot(GPUS, [first * gpus for gpus in GPUS], color=line.get_color(), linestyle=":", linewidth=1)
            if held is None:
                shares = [plan.communication / plan.seconds for _, _, plan in points]
                axes[2].plot(GPUS, shares, marker="o", label=f"{name}, ZeRO {points[-1][2].stage}")
            for gpus, sized, plan in points:
                print(
                    f"{name} {gpus:5} GPUs, {sized.batch:6} sequences: predicted {1000 * plan.seconds:8.2f} ms, "
                    f"{plan.communication / plan.seconds:4.0%} communication, ZeRO {plan.stage}, micro-batch "
                    f"{plan.micro_batch}, {plan.memory / 2**30:.1f} GiB"
                )
    titles = ("each GPU takes the recipe's batch", f"{SEQUENCES:,} sequences over all", "share of communication, weak")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", xlabel="GPUs", title=title)
        axis.legend(fontsize=7)
    for axis in axes[:2]:
        axis.set(yscale="log", ylabel="tokens of text a second, predicted")
    drawn.suptitle(f"Predicted, not measured: {about}", fontsize=9)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)


# --- The command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="YAML files; with --figure: the papers' unless named")
    parser.add_argument("--measured", nargs="+", type=Path, default=[], metavar="CSV", help="of throughput.py, to fit")
    parser.add_argument("--device", default="H100", help=f"of the cluster: {', '.join(BANDWIDTH)}, or measured")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="a node")
    parser.add_argument("--within", type=float, default=450, help="GB/s of a GPU within its node")
    parser.add_argument("--between", type=float, default=400, help="GB/s of a node to others")
    parser.add_argument("--figure", type=Path, metavar="PNG")
    chosen = parser.parse_args(argv)
    try:
        cases = read_measured(chosen.measured) if chosen.measured else []
        if cases:
            report(cases)
        if chosen.recipes or chosen.figure:
            predict(chosen, cases)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(cases: Sequence[Measured]) -> None:
    """Prints the rates, and each case's error."""
    if len(cases) <= len(RATES):
        raise UserError(f"{len(cases)} measured cases for {len(RATES)} rates: give more of them")
    rates, needed = fit(cases), [memory(case.job, case.cluster, case.stage) for case in cases]
    print(", ".join(f"{name} {rate:.3g} s" for name, rate in zip(RATES, rates, strict=True)))
    libraries = median(case.memory - tensors for case, tensors in zip(cases, needed, strict=True))
    print(f"{'':52}  measured  predicted   error    memory  predicted   error")
    relative = errors(cases)
    for case, error, tensors in zip(cases, relative, needed, strict=True):
        predicted = tensors + libraries
        print(
            f"{case.name:52}{1000 * case.seconds:7.0f} ms {1000 * case.seconds * (1 + error):7.0f} ms {error:+7.1%} "
            f"{case.memory / 2**20:5.0f} MiB  {predicted / 2**20:5.0f} MiB {predicted / case.memory - 1:+7.1%}"
        )
    print(
        f"median error of {len(relative)} cases, each predicted from the others: {median(map(abs, relative)):.1%}; to "
        f"memory {libraries / 2**20:.0f} MiB are added, the median of what libraries take at first use"
    )


def predict(chosen: argparse.Namespace, cases: Sequence[Measured]) -> None:
    cluster = Cluster(
        chosen.nodes, chosen.gpus, chosen.within * 1e9, chosen.between * 1e9, MEMORY.get(chosen.device, math.inf)
    )
    if chosen.device == "measured":
        if not cases:
            raise UserError("--device measured: name what was measured with --measured")
        cluster, fitted = of_machine(cases, cluster)
        rates = {cases[0].job.precision: fitted}
        about = f"rates fitted to {len(cases)} measured cases"
    else:
        rates = {precision: assumed(chosen.device, precision) for precision in ("fp32", "bf16")}
        peak_share, bandwidth_share, pass_seconds, collective_seconds = ASSUMED
        about = (
            f"{chosen.device}, assuming {peak_share:.0%} of its peak in products and {bandwidth_share:.0%} of its "
            f"bandwidth, {1e6 * pass_seconds:.0f} µs a layer's pass and {1e6 * collective_seconds:.0f} µs a "
            "collective's round"
        )
    about += f"; {cluster.within / 1e9:.3g} GB/s a GPU within a node of {cluster.gpus}, "
    about += f"{cluster.between / 1e9:.3g} GB/s a node beyond"
    print(about)
    for recipe in chosen.recipes:
        job = job_of(recipe)
        stage_plans = plans(job, cluster, rates_of(job, rates))
        print(f"{recipe}: {job.batch} sequences of {job.length} on {cluster.nodes} × {cluster.gpus}")
        for plan in stage_plans:
            print(
                f"  ZeRO {plan.stage}, micro-batch {plan.micro_batch}: predicted {1000 * plan.seconds:.2f} ms, of them "
                f"{1000 * plan.communication:.2f} communication; {plan.memory / 2**30:.1f} GiB a GPU"
                + (", too much" if not plan.fits else ", best" if plan is best(stage_plans) else "")
            )
    if chosen.figure is not None:
        folder = Path(__file__).parents[1] / "recipes"
        papers = chosen.recipes or [folder / name for name in PAPERS]
        figure(chosen.figure, papers, cluster, rates, about)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
