"""Predicts a step's time and memory on a cluster, and the ZeRO stage that is fastest of those that fit.

    python benchmarks/plan.py --measured plain.csv mutual.csv             rates of this machine, and the plan's error
    python benchmarks/plan.py recipes/baby_llama/student-58m.yaml --device H100 --nodes 4 --gpus 8
    python benchmarks/plan.py my.yaml --measured gpu.csv --device measured                 by the rates found there
    python benchmarks/plan.py --figure plan.png                           the papers' recipes on 8 to 1,024 GPUs

A rank's step takes

    FLOPs / rate + bytes / rate + passes · seconds
    + Σ (volume · (g−1)/g / within + volume · (n−1)/n / between + seconds · log₂ ranks)

FLOPs of matrix products as they are computed (engine.compute.flops); bytes that everything else must move, as the kernels were
counted to (benchmarks.traffic), and AdamW; passes of a model's layers, each of which costs its launches whatever its
size. Of collectives, over n nodes of g GPUs: a volume is what a reduce-scatter or an all-gather moves; an all-reduce
moves it twice. Nothing overlaps, as in the engine.

The rates are fitted to what benchmarks/throughput.py measured (its --csv), each case's error being that of a fit
without it. Without measurements, those of a device are what ASSUMED says: a guess, and its plan the same. Whatever is
printed here is predicted.

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

from engine.compute.flops import Text, inference, training
from engine.compute.hardware import listed_peak
from engine.compute.usage import NOTHING
from engine.config.loading import build, read_yaml
from engine.config.settings import Config
from engine.data.masking import SHARE
from engine.models.families import Shape, parameter_count, shape_of
from engine.models.llama import LlamaShape
from engine.models.roberta import RobertaShape
from engine.run import dry_run

RATES = ("flops", "bytes", "passes", "moved", "collectives")  # of each a rank's step has so many
ASSUMED = (
    0.4,
    0.9,
    1e-4,
    2e-5,
)  # of the peak in products, of the memory's bandwidth; seconds a layer's pass, a collective
BANDWIDTH = {"A100": 2.04e12, "H100": 3.35e12, "B200": 8.0e12, "MI300X": 5.3e12}  # bytes/s, as in benchmarks/audit.py
MEMORY = {"A100": 80e9, "H100": 80e9, "B200": 180e9, "MI300X": 192e9}  # bytes
STAGES = range(4)
LIVE_PARAMETERS = (
    500_000_000  # up to so many stay gathered from forward to backward (engine.students.cohort.engine_settings)
)
PAPERS = ("baby_llama/student-58m.yaml", "baby_llama_2/student.yaml", "babies/published.yaml")
GPUS = tuple(2**n for n in range(3, 11))
SEQUENCES = 1024  # of a step over all GPUs, where that is held


@dataclass(frozen=True)
class Job:
    """What a step has to do, over all ranks."""

    students: tuple[Shape, ...]
    teachers: tuple[Shape, ...]
    batch: int  # sequences
    length: int
    precision: str = "fp32"
    micro_batch: int | None = None  # sequences a rank takes at once; None: all of its own
    streams: int | None = None  # R; None: students, and one for all teachers
    recompute: bool = False


@dataclass(frozen=True)
class Cluster:
    """n nodes of g GPUs (or ranks); bytes a second."""

    nodes: int = 1
    gpus: int = 1
    within: float = 450e9  # of a GPU, to others of its node
    between: float = 400e9  # of a node, to others: 8 cards of 400 Gbit/s
    peak_memory: float = math.inf  # of a GPU
    kind: str = "cuda"

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Plan:
    """Predicted."""

    stage: int
    micro_batch: int
    seconds: float  # a step
    communication: float  # of them
    peak_memory: float  # bytes of a rank
    fits: bool


def quantities(job: Job, cluster: Cluster, stage: int) -> np.ndarray:
    """Of a rank's step: FLOPs, bytes, passes, seconds that collectives' volume takes, collectives."""
    share, storage = job.batch / cluster.ranks, 2 if job.precision == "bf16" else 4
    micro_batches = 1 if job.micro_batch is None else share / job.micro_batch
    flops, moved, volume, passes, collectives = NOTHING.hardware, 0.0, 0.0, 0.0, 1.0
    for shape in (*job.students, *job.teachers):
        learns, text = shape in job.students, text_of(shape, share, job.length)
        cost = training(shape, text, recompute=job.recompute) if learns else inference(shape, text)
        flops += cost.hardware
        elements = sum(elementwise(shape)[: 2 if learns else 1]) + (elementwise(shape)[0] if job.recompute else 0)
        moved += storage * text.sequences * text.length * shape.layers * elements
        passes += micro_batches * shape.layers * (2 + job.recompute if learns else 1)
    rows = text_of(job.students[0], share, job.length).rows
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
    """(of gradients, of parameters): how often all of them are reduced or gathered. DeepSpeed reduces a bucket for all
    ranks at stages 1 and 2 too; at stage 3 every micro-batch gathers anew."""
    gathers = micro_batches * (1 if P <= LIVE_PARAMETERS else 2)
    return (2.0, 0.0) if stage == 0 else (2.0, 1.0) if stage < 3 else (micro_batches, gathers)


def elementwise(shape: Shape) -> tuple[int, int]:
    """Elements per token and layer that cross between memory and what is no product, forward and backward, at least:
    two norms with residuals (2 in and 2 out), rotary positions, the activation, attention's own tensors."""
    D, F = shape.hidden, shape.ffn
    narrow = shape.kv_heads * shape.head_width if isinstance(shape, LlamaShape) else D
    rotary = 2 * (D + narrow) if isinstance(shape, LlamaShape) else 0
    activation = (3 * F, 5 * F) if isinstance(shape, LlamaShape) else (2 * F, 3 * F)
    return (
        8 * D + rotary + activation[0] + 2 * (D + narrow),
        8 * D + rotary + activation[1] + 4 * (D + narrow),
    )


def optimizer_bytes(precision: str) -> int:
    """A parameter's: weight, moments and gradient read, the first three written; the gradient's norm, and its zeroing.
    In bf16 weights are kept in fp32 too."""
    return 28 + 4 + 4 if precision == "fp32" else 28 + 4 + 3 * 2


def text_of(shape: Shape, sequences: float, length: int) -> Text:
    """Of a share that need not be whole; a RoBERTa predicts what is masked."""
    whole = round(sequences * length)
    rows = round(whole * SHARE) if isinstance(shape, RobertaShape) else whole
    return Text(whole // length, length, rows, rows, whole)


@cache
def parameters(shape: Shape) -> int:
    return parameter_count(shape)


def peak_memory(job: Job, cluster: Cluster, stage: int) -> float:
    """Bytes of a rank at its peak, allocator and libraries apart: the dry run's."""
    students = {str(i): shape for i, shape in enumerate(job.students)}
    teachers = {str(i): shape for i, shape in enumerate(job.teachers)}
    plain = {"name": "s", "layers": 1, "hidden": 2, "heads": 1, "ffn": 1}
    train = {"precision": job.precision, "recompute": job.recompute, "length": job.length, "batch": job.batch}
    mix = "each" if job.streams and job.streams > len(students) + 1 else "logits"
    config = build(Config, {"students": [plain], "train": train, "objective": {"mix": mix}})
    tokens = (job.micro_batch or math.ceil(job.batch / cluster.ranks)) * job.length
    return dry_run.peak_memory(config, students, teachers, tokens, cluster.ranks, stage, cluster.kind)


def plans(job: Job, cluster: Cluster, rates: np.ndarray) -> list[Plan]:
    """For each stage, with the largest micro-batch that fits (the smallest, if none does)."""
    found, share = [], max(1, job.batch // cluster.ranks)
    for stage in STAGES:
        if job.precision == "bf16" and stage == 0:  # refused (engine.run.checks)
            continue
        for micro in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
            small = replace(job, micro_batch=micro)
            needed = peak_memory(small, cluster, stage)
            if needed <= cluster.peak_memory or micro == 1:
                parts = quantities(small, cluster, stage) * rates
                found.append(Plan(stage, micro, parts.sum(), parts[3:].sum(), needed, fits=needed <= cluster.peak_memory))
                break
    return found


def best(found: Sequence[Plan]) -> Plan:
    """The fastest of those that fit; of equals the lowest stage."""
    return min(found, key=lambda plan: (not plan.fits, plan.seconds, plan.stage))


# --- Rates ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A case as benchmarks/throughput.py found it."""

    name: str
    job: Job
    cluster: Cluster
    stage: int
    seconds: float
    peak_memory: float  # bytes beyond imports


def read_measured(paths: Iterable[Path]) -> list[Measured]:
    """The rows of `ours`, without those of noisy minutes and of steps with an outer loop, which plans do not know.
    ValueError where they come from several devices, or are of several precisions."""
    rows = [row for path in paths for row in csv.DictReader(path.open(newline="")) if row["variant"] == "ours"]
    kept = [row for row in rows if row["void"] == "False" and "outer" not in row["overrides"]]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} cases are left out: void, or with an outer loop")
    devices = sorted({row["device"] for row in kept})
    if len(devices) != 1:
        raise ValueError(f"measured on {' and '.join(devices) or 'nothing'}: give one device's files")
    precisions = sorted({row["precision"] for row in kept})
    if len(precisions) > 1:
        raise ValueError(f"measured in {' and '.join(precisions)}: give the files of one precision")
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
    cluster = Cluster(1, ranks, within=1.0, between=1.0, kind=kind)  # the fit finds seconds a byte
    own = float(row["beyond_state_mebibytes"]) * 2**20 + state(job, ranks, int(row["zero_stage"]))
    name = f"{row['task']} S={row['students']} K={row['teachers']} V={vocab_size} L={length} B={row['batch']}"
    name += f", {ranks} ranks, ZeRO {row['zero_stage']}" if ranks > 1 else ""
    return Measured(name, job, cluster, int(row["zero_stage"]), float(row["milliseconds"]) / 1000, own)


def parse(text: str, vocab_size: int, length: int) -> Shape:
    """A shape as throughput.py describes it, such as llama-8x256x8x768 or llama-32x960x15x2560x5-untied."""
    family, sizes, *untied = text.split("-")
    names = ("layers", "hidden", "heads", "ffn", "kv_heads")
    settings = dict(zip(names, map(int, sizes.split("x")), strict=False))
    student = {"name": "s", "family": family, **settings, "max_length": length, "tied": not untied}
    (config,) = build(Config, {"students": [student]}).students
    return shape_of(config, vocab_size)


def state(job: Job, ranks: int, stage: int) -> float:
    """Bytes of weights and moments that throughput.py subtracts."""
    storage = 2 if job.precision == "bf16" else 4
    a_student = storage / (ranks if stage == 3 else 1) + 8 / (ranks if stage > 0 else 1)
    a_student += 4 / ranks if job.precision == "bf16" else 0
    return a_student * sum(map(parameters, job.students)) + storage * sum(map(parameters, job.teachers))


def fit(cases: Sequence[Measured]) -> np.ndarray:
    """Seconds for one of each quantity, none below 0, by least squares of relative errors."""
    table = np.array([quantities(c.job, c.cluster, c.stage) / c.seconds for c in cases])
    found, error = np.zeros(table.shape[1]), math.inf
    for size in range(1, table.shape[1] + 1):
        for chosen in itertools.combinations(range(table.shape[1]), size):
            part = table[:, chosen]
            scale = part.max(axis=0)
            if (scale == 0).any() or len(chosen) > len(cases):
                continue
            solved = np.linalg.lstsq(part / scale, np.ones(len(cases)), rcond=None)[0] / scale
            off = float(((part @ solved - 1) ** 2).sum())
            if (solved >= 0).all() and off < error - 1e-12:
                found, error = np.zeros(table.shape[1]), off
                found[list(chosen)] = solved
    return found


def errors(cases: Sequence[Measured]) -> list[float]:
    """Relative, of each case's time as predicted from the others."""
    found = []
    for i, case in enumerate(cases):
        rates = fit([*cases[:i], *cases[i + 1 :]])
        found.append(float(quantities(case.job, case.cluster, case.stage) @ rates) / case.seconds - 1)
    return found


def of_machine(cases: Sequence[Measured], cluster: Cluster) -> tuple[Cluster, np.ndarray]:
    """A cluster of the measured machine, and its rates; of its network, what no case has told is as given."""
    rates = fit(cases)
    within = cluster.within if rates[3] == 0 else 1 / rates[3]
    seconds = rates[4] or ASSUMED[3]
    return replace(cluster, within=within, kind=cases[0].cluster.kind), np.array([*rates[:3], 1.0, seconds])


def assumed(device: str, precision: str) -> np.ndarray:
    """Seconds for one of each quantity on a GPU that nobody has measured."""
    peak = listed_peak(device, precision)
    if device not in BANDWIDTH or peak is None:
        raise ValueError(f"--device {device}: expected one of {', '.join(BANDWIDTH)}")
    of_peak, of_bandwidth, a_pass, a_collective = ASSUMED
    return np.array([1 / (of_peak * peak), 1 / (of_bandwidth * BANDWIDTH[device]), a_pass, 1.0, a_collective])


def rates_of(job: Job, rates: Mapping[str, np.ndarray]) -> np.ndarray:
    """Those of its precision; ValueError where nobody has measured them."""
    if job.precision not in rates:
        raise ValueError(f"train.precision={job.precision}: measured in {', '.join(rates)} alone; measure that too")
    return rates[job.precision]


# --- Recipes ----------------------------------------------------------------------------------------------------------


def job_of(recipe: Path) -> Job:
    """A recipe's step; teachers that are not trained yet have the shapes of the recipes beside it."""
    config = build(Config, read_yaml(recipe))
    vocab_size = config.data.tokenizer.vocab_size or 16000
    train, K = config.train, range(len(config.teachers))
    teachers = tuple(dry_run.teacher_shape(config, i, vocab_size, recipe.parent) for i in K if config.cache is None)
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
    """Tokens a second of text against GPUs: each takes the recipe's batch, or all of them SEQUENCES together."""
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 3, figsize=(15, 4.6))
    for recipe in recipes:
        job, name = job_of(recipe), f"{recipe.parent.name}/{recipe.stem}"
        for axis, held in zip(axes[:2], (None, SEQUENCES), strict=True):
            found = []
            for gpus in GPUS:
                sized = replace(job, batch=held or job.batch * gpus)
                where = replace(cluster, nodes=gpus // cluster.gpus)
                found.append((gpus, sized, best(plans(sized, where, rates_of(job, rates)))))
            speeds = [sized.batch * sized.length / plan.seconds for _, sized, plan in found]
            (line,) = axis.plot(GPUS, speeds, marker="o", label=name)
            first = speeds[0] / GPUS[0]
            axis.plot(GPUS, [first * gpus for gpus in GPUS], color=line.get_color(), linestyle=":", linewidth=1)
            if held is None:
                shares = [plan.communication / plan.seconds for _, _, plan in found]
                axes[2].plot(GPUS, shares, marker="o", label=f"{name}, ZeRO {found[-1][2].stage}")
            for gpus, sized, plan in found:
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
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(cases: Sequence[Measured]) -> None:
    """The rates, and each case's error."""
    if len(cases) <= len(RATES):
        raise ValueError(f"{len(cases)} measured cases for {len(RATES)} rates: give more of them")
    rates, needed = fit(cases), [peak_memory(case.job, case.cluster, case.stage) for case in cases]
    print(", ".join(f"{name} {rate:.3g} s" for name, rate in zip(RATES, rates, strict=True)))
    beside = median(case.peak_memory - found for case, found in zip(cases, needed, strict=True))
    print(f"{'':52}  measured  predicted   error    memory  predicted   error")
    found = errors(cases)
    for case, error, least in zip(cases, found, needed, strict=True):
        predicted = least + beside
        print(
            f"{case.name:52}{1000 * case.seconds:7.0f} ms {1000 * case.seconds * (1 + error):7.0f} ms {error:+7.1%} "
            f"{case.memory / 2**20:5.0f} MiB  {predicted / 2**20:5.0f} MiB {predicted / case.memory - 1:+7.1%}"
        )
    print(
        f"median error of {len(found)} cases, each predicted from the others: {median(map(abs, found)):.1%}; to memory "
        f"{beside / 2**20:.0f} MiB are added, the median of what libraries take at first use"
    )


def predict(chosen: argparse.Namespace, cases: Sequence[Measured]) -> None:
    cluster = Cluster(
        chosen.nodes, chosen.gpus, chosen.within * 1e9, chosen.between * 1e9, MEMORY.get(chosen.device, math.inf)
    )
    if chosen.device == "measured":
        if not cases:
            raise ValueError("--device measured: name what was measured with --measured")
        cluster, fitted = of_machine(cases, cluster)
        rates = {cases[0].job.precision: fitted}
        about = f"rates fitted to {len(cases)} measured cases"
    else:
        rates = {precision: assumed(chosen.device, precision) for precision in ("fp32", "bf16")}
        of_peak, of_bandwidth, a_pass, a_collective = ASSUMED
        about = (
            f"{chosen.device}, assuming {of_peak:.0%} of its peak in products and {of_bandwidth:.0%} of its bandwidth, "
            f"{1e6 * a_pass:.0f} µs a layer's pass and {1e6 * a_collective:.0f} µs a collective's round"
        )
    about += f"; {cluster.within / 1e9:.3g} GB/s a GPU within a node of {cluster.gpus}, "
    about += f"{cluster.between / 1e9:.3g} GB/s a node beyond"
    print(about)
    for recipe in chosen.recipes:
        job = job_of(recipe)
        found = plans(job, cluster, rates_of(job, rates))
        print(f"{recipe}: {job.batch} sequences of {job.length} on {cluster.nodes} × {cluster.gpus}")
        for plan in found:
            print(
                f"  ZeRO {plan.stage}, micro-batch {plan.micro_batch}: predicted {1000 * plan.seconds:.2f} ms, of them "
                f"{1000 * plan.communication:.2f} communication; {plan.memory / 2**30:.1f} GiB a GPU"
                + (", too much" if not plan.fits else ", best" if plan is best(found) else "")
            )
    if chosen.figure is not None:
        folder = Path(__file__).parents[1] / "recipes"
        papers = chosen.recipes or [folder / name for name in PAPERS]
        figure(chosen.figure, papers, cluster, rates, about)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
