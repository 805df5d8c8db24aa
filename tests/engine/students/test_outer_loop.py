"""The hypergradient against finite differences of everything it stands for, and ω on its simplex.

N tokens, V vocabulary, S students.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from engine.config.loading import build
from engine.config.settings import Config, ObjectiveConfig, OuterConfig
from engine.data.batches import IGNORED, Batch, Step
from engine.models.llama import Llama, LlamaShape
from engine.run.check_settings import check
from engine.students import hypergradient as hypergradient_module
from engine.students.coefficients import LossWeighting
from engine.students.hypergradient import FunctionalStudent, Hypergradient, Parameters, hypergradient
from engine.students.outer_loop import OuterLoop, mirror_descent
from engine.system.errors import UserError
from tests.engine.students import slow_hypergradient

V, ALPHA, TEMPERATURE = 23, 0.6, 1.5
CPU = torch.device("cpu")
SHAPES = [  # layers, hidden, heads, kv heads, inner width, tied
    (2, 16, 4, 2, 24, True),
    (1, 12, 2, 2, 20, False),
    (1, 8, 2, 1, 16, True),
    (2, 12, 2, 1, 16, False),
]
STEP_SIZES = (0.5, 0.3, 0.8, 0.4)  # so large that the inner step matters
OBJECTIVE = ObjectiveConfig(ce_weight=1 - ALPHA, peer_weight=ALPHA, weighted=True, temperature=TEMPERATURE)


@cache
def students(count: int) -> tuple[list[LlamaShape], list[Parameters]]:
    shapes, parameters = [], []
    for seed, (layers, hidden, heads, kv_heads, ffn, tied) in enumerate(SHAPES[:count]):
        shape = LlamaShape(layers, hidden, heads, ffn, V, max_length=16, tied=tied, kv_heads=kv_heads)
        generator = torch.Generator().manual_seed(seed)
        shapes.append(shape)
        parameters.append(
            {
                name: 1.0 + torch.rand(p.shape, generator=generator, dtype=torch.float64)
                if p.ndim == 1
                else 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
                for name, p in Llama(shape).named_parameters()
            }
        )
    return shapes, parameters


def step_of(seed: int, micro_batches: int) -> Step:
    """8 sequences of 7 tokens; some rows predict nothing, and unevenly over the micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(V, (8, 8), generator=generator)
    targets_BL = tokens_BL[:, 1:].clone()
    targets_BL[0, :5] = targets_BL[3, 2] = IGNORED
    parts = zip(tokens_BL[:, :-1].chunk(micro_batches), targets_BL.chunk(micro_batches), strict=True)
    batches = [Batch(tokens, targets.flatten()) for tokens, targets in parts]
    valid = int((targets_BL != IGNORED).sum())
    return Step(1, 0.0, valid, valid, 0, batches)


def logits(shape: LlamaShape, parameters: Parameters, batch: Batch) -> Tensor:
    """[N, V], with the head read off by name."""
    hidden_ND = functional_call(Llama(shape).double(), parameters, (batch.tokens_BL,))
    return hidden_ND @ parameters["embed_tokens.weight" if shape.tied else "lm_head.weight"].T


def plain_inner_step(omega_S: Tensor, train: Step) -> list[Parameters]:
    """Returns the parameters after one step of SGD on weighted mutual learning, from its equations, in one graph."""
    shapes, before = students(len(omega_S))
    leaves = [{n: p.clone().requires_grad_() for n, p in named.items()} for named in before]
    total = torch.zeros((), dtype=torch.float64)
    for batch in train.micro_batches:
        valid_N = batch.targets_N != IGNORED
        z = [logits(shape, named, batch)[valid_N] for shape, named in zip(shapes, leaves, strict=True)]
        for i in range(len(z)):
            total = total + (1 - ALPHA) * omega_S[i] * F.cross_entropy(z[i], batch.targets_N[valid_N], reduction="sum")
            for j in range(len(z)):
                if j != i:
                    peer = F.log_softmax(z[j].detach() / TEMPERATURE, -1)
                    student = F.log_softmax(z[i] / TEMPERATURE, -1)
                    kl = F.kl_div(student, peer, reduction="sum", log_target=True)
                    total = total + ALPHA * omega_S[j] * TEMPERATURE**2 * kl
    (total * len(shapes) / train.valid_tokens).backward()
    return [
        {n: (p - step_size * p.grad).detach() for n, p in named.items() if p.grad is not None}
        for named, step_size in zip(leaves, STEP_SIZES, strict=False)
    ]


def plain_validation(omega_S: Tensor, parameters: list[Parameters], held_out: Step) -> Tensor:
    shapes, _ = students(len(omega_S))
    total = torch.zeros((), dtype=torch.float64)
    for batch in held_out.micro_batches:
        z_SNV = torch.stack([logits(shape, named, batch) for shape, named in zip(shapes, parameters, strict=True)])
        mixed_NV = torch.einsum("s,snv->nv", omega_S, z_SNV)
        total += F.cross_entropy(mixed_NV, batch.targets_N, reduction="sum")
    return total / held_out.valid_tokens


def finite_differences(omega_S: Tensor, train: Step, held_out: Step) -> Tensor:
    """Returns the derivative [S] of the validation loss after the inner step, by ω, from central differences."""

    def loss_after_step(omega_S: Tensor) -> Tensor:
        return plain_validation(omega_S, plain_inner_step(omega_S, train), held_out)

    steps = 1e-5 * torch.eye(len(omega_S), dtype=torch.float64)
    with torch.enable_grad():
        return torch.stack([(loss_after_step(omega_S + h) - loss_after_step(omega_S - h)) / 2e-5 for h in steps])


def our_hypergradient(
    count: int, accumulation: int, weighting: LossWeighting | None = None, **options: Any
) -> Hypergradient:
    (shapes, before), omega_S = students(count), omega_of(count)
    train, held_out = step_of(1, accumulation), step_of(2, 2)
    weighting = weighting or LossWeighting(OBJECTIVE, count, CPU)
    after = plain_inner_step(omega_S, train)
    functional = [FunctionalStudent(shape) for shape in shapes]
    return hypergradient(functional, before, after, STEP_SIZES[:count], train, held_out, omega_S, weighting, **options)


def omega_of(count: int) -> Tensor:
    return torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)[:count] * (1 + 0.1 * count)


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_hypergradient_equals_finite_differences_of_inner_step_and_validation(count: int, accumulation: int) -> None:
    ours = our_hypergradient(count, accumulation)
    expected = finite_differences(omega_of(count), step_of(1, 1), step_of(2, 1))
    assert error(ours.total, expected) <= 1e-6
    for term in (ours.direct, ours.own, ours.peers):
        assert term.norm() > 1e-2 * expected.norm(), "a term this small could be wrong and nobody would see it"


@pytest.mark.parametrize(("temperature", "divergence"), [(1.0, "forward"), (1.5, "reverse"), (0.7, "jsd")])
def test_forward_mode_equals_backward_passes(
    temperature: float, divergence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = replace(OBJECTIVE, temperature=temperature, divergence=divergence)
    weighting = LossWeighting(objective, 3, CPU)
    ours = our_hypergradient(3, 4, weighting)
    monkeypatch.setattr(hypergradient_module, "_inner_derivatives", slow_hypergradient.inner_derivatives)
    expected = our_hypergradient(3, 4, weighting)
    for term in ("direct", "own", "peers"):
        assert error(getattr(ours, term), getattr(expected, term)) <= 1e-10


def test_the_direct_term_alone() -> None:
    whole, direct = our_hypergradient(2, 1), our_hypergradient(2, 1, terms="direct")
    assert torch.equal(direct.total, whole.direct)
    assert direct.shares() == {"direct": 1.0, "own": 0.0, "peers": 0.0}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-3, 1), st.floats(-1e308, 1e308)), min_size=2, max_size=8),
    st.floats(0, 1e6),
)
def test_omega_stays_inside_the_simplex(pairs: list[tuple[float, float]], step_size: float) -> None:
    total = sum(w for w, _ in pairs)
    moved = mirror_descent([w / total for w, _ in pairs], [g for _, g in pairs], step_size, min_weight=1e-4)
    assert sum(moved) == pytest.approx(1, abs=1e-12)
    assert min(moved) > 0.99e-4


def test_mirror_descent_multiplies_by_exponentials() -> None:
    moved = mirror_descent([0.5, 0.3, 0.2], [0.7, -0.2, 0.1], 0.25, min_weight=1e-4)
    expected = [0.5 * math.exp(-0.25 * 0.7), 0.3 * math.exp(0.25 * 0.2), 0.2 * math.exp(-0.25 * 0.1)]
    assert moved == pytest.approx([e / sum(expected) for e in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("outer", "students", "message"),
    [
        ({"initial": [1.0, 1.0]}, 3, "outer.initial has 2 weights for 3 students"),
        ({"min_weight": 0.5}, 2, "outer.min_weight=0.5: expected between 0 and 1/2"),
        ({"every": 5}, 1, "weighs students for one another, and here none learns from another"),
        ({"step_size": 0.5}, 2, "outer.step_size=0.5 has no effect without outer.every"),
    ],
)
def test_settings_that_do_not_fit_are_refused(outer: dict[str, Any], students: int, message: str) -> None:
    student = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 32}
    config = {
        "students": [{"name": f"s{number}", **student} for number in range(students)],
        "objective": {"weighted": True},
        "outer": outer,
    }
    with pytest.raises(UserError, match=message):
        check(build(Config, config))


def outer_loop(config: OuterConfig, steps: int) -> OuterLoop:
    return OuterLoop(config, steps, LossWeighting(OBJECTIVE, 2, CPU), None)


def test_weights_begin_in_proportion_and_stay_where_no_update_is_wanted() -> None:
    outer = outer_loop(OuterConfig(initial=(1.0, 3.0)), 10)
    assert outer.omega_S.tolist() == [0.25, 0.75]
    assert not any(map(outer.is_due, range(1, 11)))


def test_step_size_falls_as_half_a_cosine() -> None:
    outer = outer_loop(OuterConfig(every=2), 100)
    assert [outer.step_size(step) for step in (0, 50, 100)] == pytest.approx([0.25, 0.12625, 0.0025])


@pytest.fixture(scope="module")
def folder(spawn_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of outer_loop_worker.py's findings, from students in DeepSpeed engines on 1 and 2 ranks."""
    folder = tmp_path_factory.mktemp("outer")
    worker = Path(__file__).with_name("outer_loop_worker.py")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda world_size: spawn_ranks(worker, world_size, folder), (1, 2)))
    return folder


def findings(folder: Path, world_size: int) -> Any:
    return json.loads((folder / f"findings-{world_size}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero0", "zero1", "zero2", "zero3", "zero0-backward-passes"])
def test_ranks_and_zero_stages_do_not_change_the_hypergradient(folder: Path, case: str) -> None:
    expected = findings(folder, 1)["zero0"]
    for world_size in (1, 2):
        ours = findings(folder, world_size)[case]
        for key in ("direct", "own", "peers", "omegas", "losses"):
            assert error(torch.tensor(ours[key]).double(), torch.tensor(expected[key]).double()) <= 1e-5, key


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_looking_at_omega_leaves_the_students_bit_for_bit(folder: Path, stage: int) -> None:
    assert findings(folder, 2)[f"zero{stage}-undisturbed"] == []


@pytest.mark.slow
def test_a_run_resumed_from_its_state_ends_with_the_same_weights(folder: Path) -> None:
    resumed = findings(folder, 1)["resumed"]
    assert resumed["state"] == resumed["state_of_whole"]
    assert resumed["differing"] == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["idle", "shuffled"])
def test_a_student_that_cannot_learn_loses_its_weight_and_twins_keep_equal_ones(folder: Path, fault: str) -> None:
    first, second, bad = findings(folder, 1)[f"planted-{fault}"]
    assert bad < 0.5 * first
    assert first == pytest.approx(second, rel=1e-4)
