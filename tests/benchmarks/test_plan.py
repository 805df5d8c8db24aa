"""The planner: its arithmetic by hand, its fit to measurements, and the stage that it takes."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plan, throughput
from benchmarks.plan import Cluster, Job, Measured
from engine.compute.flops import Workload, inference, training
from engine.models.llama import LlamaShape
from engine.system.errors import UserError

SMALL = LlamaShape(layers=2, hidden=32, heads=4, kv_heads=4, ffn=48, vocab_size=64, max_length=16, tied=True)
LARGE = replace(SMALL, layers=4, hidden=64)
P = 64 * 32 + 2 * (4 * 32**2 + 3 * 32 * 48 + 2 * 32) + 32
JOB = Job((SMALL,), (LARGE,), batch=8, length=16)
RATES = np.array([1e-9, 2e-10, 3e-6, 1.0, 4e-5])


def test_quantities_by_hand():
    flops, moved, passes, seconds, collectives = plan.quantities(JOB, Cluster(), 0)
    work = Workload.whole(8, 16)
    assert flops == training(SMALL, work).hardware + inference(LARGE, work).hardware
    elements_per_token = 2 * (2 * (8 * 32 + 4 * 32) + 8 * 48 + 6 * 64) + 4 * (8 * 64 + 4 * 64 + 3 * 48 + 4 * 64)
    loss, adamw = 128 * 64 * (2 * 2 + 1), 36 * P
    assert moved == 4 * 128 * elements_per_token + 4 * loss + adamw
    assert passes == 2 * 2 + 4
    assert (seconds, collectives) == (0, 0), "one rank"


@pytest.mark.parametrize(("stage", "volume", "calls"), [(0, 2, 1), (1, 3, 2), (2, 3, 2), (3, 2, 4)])
def test_what_ranks_send(stage: int, volume: int, calls: int):
    """Over two nodes of four: three quarters of a volume within a node, half of it between them."""
    alone = plan.quantities(JOB, Cluster(), stage)
    shared = plan.quantities(JOB, Cluster(2, 4, within=1000, between=100), stage)
    assert shared[0] == alone[0] / 8, "each its share of the text"
    assert shared[3] == pytest.approx(volume * 4 * P * (3 / 4 / 1000 + 1 / 2 / 100))
    assert shared[4] == (1 + calls) * 3, "log₂ of eight ranks rounds each"


def test_gradients_are_accumulated_in_passes_of_their_own():
    whole, halves = (plan.quantities(replace(JOB, micro_batch=m), Cluster(), 0) for m in (8, 4))
    assert halves[2] == 2 * whole[2]
    np.testing.assert_array_equal(halves[:2], whole[:2])


def measured(seconds: float | None = None, **changes: object) -> Measured:
    job = replace(JOB, **changes)  # pyright: ignore[reportArgumentType]
    predicted = float(plan.quantities(job, Cluster(), 0) @ RATES)
    return Measured("case", job, Cluster(), 0, predicted if seconds is None else seconds, 0)


def test_rates_are_found_again_and_an_error_is_seen():
    wide = replace(SMALL, vocab_size=256)
    cases = [measured(batch=b) for b in (4, 16, 64)]
    cases += [measured(length=n) for n in (8, 64)]
    cases += [measured(teachers=()), measured(teachers=(LARGE, LARGE)), measured(students=(wide, wide), teachers=())]
    np.testing.assert_allclose(plan.fit(cases)[:3], RATES[:3], rtol=1e-6)
    assert max(map(abs, plan.errors(cases))) < 1e-6
    cases[0] = replace(cases[0], seconds=2 * cases[0].seconds)
    assert plan.errors(cases)[0] == pytest.approx(-0.5), "predicted from the others alone"
    assert (plan.fit(cases) >= 0).all()


def test_the_stage_that_is_fastest_of_those_that_fit():
    cluster = Cluster(1, 8, within=1e3)  # so slow that volumes decide
    job = replace(JOB, batch=64)
    stage_plans = plan.plans(job, cluster, RATES)
    assert [p.stage for p in stage_plans] == [0, 1, 2, 3]
    assert plan.best(stage_plans).stage == 0
    needed = min(p.memory for p in stage_plans)
    assert needed < stage_plans[0].memory, "moments are shared out"
    tight = plan.best(plan.plans(job, replace(cluster, memory=needed * 1.001), RATES))
    assert tight.fits
    assert (tight.stage, tight.micro_batch) != (0, 8)
    hopeless = plan.best(plan.plans(job, replace(cluster, memory=1), RATES))
    assert (hopeless.fits, hopeless.micro_batch) == (False, 1)
    assert [p.stage for p in plan.plans(replace(job, precision="bf16"), cluster, RATES)] == [1, 2, 3]


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, kv_heads=2, tied=False)])
def test_shapes_are_read_as_they_are_written(shape: LlamaShape):
    assert plan.parse(throughput.described(shape), shape.vocab_size, shape.max_length) == shape


def write(path: Path, **changes: object) -> Path:
    row = {
        "variant": "ours", "task": "distil", "students": 1, "teachers": 1, "student_shapes": "llama-2x32x4x48",
        "teacher_shapes": "llama-4x64x4x48", "vocabulary": 64, "length": 16, "batch": 8, "ranks": 1, "zero_stage": 0,
        "precision": "fp32", "overrides": "train.batch=8", "milliseconds": 5.0, "beyond_state_mebibytes": 10.0,
        "void": "False", "device": "a CPU, 1 threads a rank",
    }  # fmt: skip
    rows = [row | changes, row | {"variant": "transformers"}, row | {"void": "True", "milliseconds": 500}]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_what_is_read_of_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (case,) = plan.read_measured([write(tmp_path / "a.csv")])
    assert case.job == JOB
    assert (case.seconds, case.cluster.ranks, case.cluster.kind) == (0.005, 1, "cpu")
    assert case.memory == 10 * 2**20 + 12 * P + 4 * plan.parameters(LARGE)
    assert "1 of 2 cases are left out" in capsys.readouterr().out
    other = write(tmp_path / "b.csv", device="another")
    with pytest.raises(UserError, match="one device's files"):
        plan.read_measured([tmp_path / "a.csv", other])
    mixed = write(tmp_path / "c.csv", precision="bf16", zero_stage=1)
    with pytest.raises(UserError, match="files of one precision"):
        plan.read_measured([tmp_path / "a.csv", mixed])
    assert plan.main(["--measured", str(other)]) == 2
    assert "1 measured cases for 5 rates" in capsys.readouterr().err


def test_the_papers_recipes_are_planned(capsys: pytest.CaptureFixture[str]):
    recipes = Path(plan.__file__).parents[1] / "recipes"
    assert plan.main([str(recipes / name) for name in plan.PAPERS]) == 0
    printed = capsys.readouterr().out
    assert printed.count(", best") == len(plan.PAPERS)
    assert printed.count("predicted") == 3 * len(plan.PAPERS)
    assert plan.main([str(recipes / plan.PAPERS[0]), "--device", "measured"]) == 2
    in_bf16 = plan.job_of(recipes / plan.PAPERS[0])
    with pytest.raises(UserError, match="measured in fp32 alone"):
        plan.rates_of(in_bf16, {"fp32": plan.assumed("H100", "fp32")})
    assert plan.assumed("H100", "fp32")[0] > 10 * plan.assumed("H100", "bf16")[0], "no TF32: nobody asks for it"
