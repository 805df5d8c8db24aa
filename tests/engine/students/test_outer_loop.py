"""The hypergradient against finite differences of everything it stands for, and ω on its simplex.

N tokens, V vocabulary, S students.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from engine.data.batches import IGNORED, Batch, Step
from engine.models.llama import Llama, LlamaShape
from engine.students.coefficients import LossCoefficients
from engine.students.hypergradient import Hypergradient, Parameters, Stream, hypergradient
from engine.students.outer_loop import OuterConfig, OuterLoop, mirror_descent
from engine.system.distributed import Runtime

V, ALPHA = 23, 0.6
SHAPES = [  # layers, hidden, heads, kv heads, inner width, tied
    (2, 16, 4, 2, 24, True),
    (1, 12, 2, 2, 20, False),
    (1, 8, 2, 1, 16, True),
    (2, 12, 2, 1, 16, False),
]
HERE = Runtime(0, 1, 0, torch.device("cpu"))
RATES = (0.5, 0.3, 0.8, 0.4)  # so large that the inner step matters


@cache
def students(count: int) -> tuple[list[LlamaShape], list[Parameters]]:
    shapes, parameters = [], []
    for seed, (layers, hidden, heads, kv_heads, ffn, tied) in enumerate(SHAPES[:count]):
        shape = LlamaShape(layers, hidden, heads, kv_heads, ffn, V, 16, tied)
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


def weigh(omega_S: Tensor, temperature: float = 1.5, divergence: str = "forward") -> LossCoefficients:
    """The design's table: S·(1−α)·ω_i on cross-entropy, S·α·ω_j on the divergence from peer j."""
    count = len(omega_S)
    kl_weight_SS = (count * ALPHA * omega_S.expand(count, count)).fill_diagonal_(0)
    learn = bool(kl_weight_SS.any())
    return LossCoefficients(count * (1 - ALPHA) * omega_S, kl_weight_SS if learn else None, temperature, divergence)


def logits(shape: LlamaShape, parameters: Parameters, batch: Batch) -> Tensor:
    """[N, V], with the head read off by name."""
    hidden_ND = functional_call(Llama(shape).double(), parameters, (batch.tokens_BL,))
    return hidden_ND @ parameters["embed_tokens.weight" if shape.tied else "lm_head.weight"].T


def plain_inner_step(omega_S: Tensor, train: Step, scales: Any = RATES) -> list[Parameters]:
    """One step of SGD on weighted mutual learning, from its equations, in one plain graph."""
    temperature = 1.5
    shapes, before = students(len(omega_S))
    leaves = [{n: p.clone().requires_grad_() for n, p in own.items()} for own in before]
    total = torch.zeros((), dtype=torch.float64)
    for batch in train.micro_batches:
        valid_N = batch.targets_N != IGNORED
        z = [logits(shape, own, batch)[valid_N] for shape, own in zip(shapes, leaves, strict=True)]
        for i in range(len(z)):
            total = total + (1 - ALPHA) * omega_S[i] * F.cross_entropy(z[i], batch.targets_N[valid_N], reduction="sum")
            for j in range(len(z)):
                if j != i:
                    peer = F.log_softmax(z[j].detach() / temperature, -1)
                    own = F.log_softmax(z[i] / temperature, -1)
                    kl = F.kl_div(own, peer, reduction="sum", log_target=True)
                    total = total + ALPHA * omega_S[j] * temperature**2 * kl
    (total * len(shapes) / train.valid_tokens).backward()
    return [
        {n: (p - (scale[n] if isinstance(scale, dict) else scale) * p.grad).detach() for n, p in own.items()}
        for own, scale in zip(leaves, scales, strict=False)
    ]


def plain_validation(omega_S: Tensor, points: list[Parameters], held_out: Step, ensemble: str) -> Tensor:
    shapes, _ = students(len(omega_S))
    total = torch.zeros((), dtype=torch.float64)
    for batch in held_out.micro_batches:
        z_SNV = torch.stack([logits(shape, own, batch) for shape, own in zip(shapes, points, strict=True)])
        if ensemble == "logits":
            mixed_NV = torch.einsum("s,snv->nv", omega_S, z_SNV)
            total += F.cross_entropy(mixed_NV, batch.targets_N, reduction="sum")
        else:
            mixed_NV = torch.einsum("s,snv->nv", omega_S, z_SNV.softmax(-1))
            total += F.nll_loss(mixed_NV.log(), batch.targets_N, reduction="sum")
    return total / held_out.valid_tokens


def finite_differences(omega_S: Tensor, train: Step, held_out: Step, ensemble: str = "logits", **scales: Any) -> Tensor:
    """Of the whole: inner step, then validation."""

    def whole(omega_S: Tensor) -> Tensor:
        return plain_validation(omega_S, plain_inner_step(omega_S, train, **scales), held_out, ensemble)

    steps = 1e-5 * torch.eye(len(omega_S), dtype=torch.float64)
    with torch.enable_grad():
        return torch.stack([(whole(omega_S + h) - whole(omega_S - h)) / 2e-5 for h in steps])


def found(
    count: int, accumulation: int, omega_S: Tensor, kind: Any = weigh, scales: Any = RATES, **options: Any
) -> Hypergradient:
    shapes, before = students(count)
    train, held_out = step_of(1, accumulation), step_of(2, 2)
    streams = [Stream(lambda s=shape: Llama(s)) for shape in shapes]
    after = plain_inner_step(omega_S, train, scales)
    return hypergradient(streams, before, after, scales[:count], train, held_out, omega_S, kind, **options)


def omega_of(count: int) -> Tensor:
    return torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)[:count] * (1 + 0.1 * count)


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_hypergradient_equals_finite_differences_of_inner_step_and_validation(count: int, accumulation: int) -> None:
    omega_S = omega_of(count)
    ours = found(count, accumulation, omega_S)
    expected = finite_differences(omega_S, step_of(1, 1), step_of(2, 1))
    assert error(ours.total, expected) <= 1e-6
    for term in (ours.direct, ours.own, ours.peers):
        assert term.norm() > 1e-2 * expected.norm(), "a term this small could be wrong and nobody would see it"


def test_hypergradient_of_a_mixture_of_probabilities() -> None:
    omega_S = omega_of(3)
    ours = found(3, 1, omega_S, ensemble="probabilities")
    assert error(ours.total, finite_differences(omega_S, step_of(1, 1), step_of(2, 1), "probabilities")) <= 1e-6


@pytest.mark.parametrize(("temperature", "divergence"), [(1.0, "forward"), (1.5, "reverse"), (0.7, "jsd")])
def test_three_ways_to_the_same_hypergradient(temperature: float, divergence: str) -> None:
    kind = partial(weigh, temperature=temperature, divergence=divergence)
    ways = [found(3, 4, omega_of(3), kind, method=method) for method in ("forward", "backward", "central")]
    for way, tolerance in zip(ways[1:], (1e-10, 1e-5), strict=True):
        for term in ("direct", "own", "peers"):
            assert error(getattr(way, term), getattr(ways[0], term)) <= tolerance


def test_inner_step_preconditioned_per_parameter() -> None:
    """γ_k·P_k as tensors: what SGD does in rescaled coordinates."""
    omega_S, (_, before) = omega_of(2), students(2)
    generator = torch.Generator().manual_seed(9)
    scales = [{n: torch.rand(p.shape, generator=generator, dtype=p.dtype) for n, p in own.items()} for own in before]
    ours = found(2, 1, omega_S, scales=scales)
    assert error(ours.total, finite_differences(omega_S, step_of(1, 1), step_of(2, 1), scales=scales)) <= 1e-6


def test_first_order_is_the_direct_term_alone() -> None:
    whole, first = found(2, 1, omega_of(2)), found(2, 1, omega_of(2), terms="first")
    assert torch.equal(first.total, whole.direct)
    assert first.shares() == {"direct": 1.0, "own": 0.0, "peers": 0.0}


def test_a_teacher_whose_weight_depends_on_omega_is_refused() -> None:
    def teachers_too(omega_S: Tensor) -> LossCoefficients:
        return LossCoefficients(omega_S, omega_S[:, None].expand(-1, 3), 1.0, "forward")

    with pytest.raises(ValueError, match="the outer loop weighs students alone"):
        found(2, 1, omega_of(2), teachers_too)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-3, 1), st.floats(-1e308, 1e308)), min_size=2, max_size=8),
    st.floats(0, 1e6),
)
def test_omega_stays_inside_the_simplex(pairs: list[tuple[float, float]], step_size: float) -> None:
    total = sum(w for w, _ in pairs)
    moved = mirror_descent([w / total for w, _ in pairs], [g for _, g in pairs], step_size, floor=1e-4)
    assert sum(moved) == pytest.approx(1, abs=1e-12)
    assert min(moved) > 0.99e-4


def test_mirror_descent_multiplies_by_exponentials() -> None:
    moved = mirror_descent([0.5, 0.3, 0.2], [0.7, -0.2, 0.1], 0.25, floor=1e-4)
    expected = [0.5 * math.exp(-0.25 * 0.7), 0.3 * math.exp(0.25 * 0.2), 0.2 * math.exp(-0.25 * 0.1)]
    assert moved == pytest.approx([e / sum(expected) for e in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("config", "students", "message"),
    [
        (OuterConfig(initial=(1.0, 1.0)), 3, "outer.initial has 2 weights for 3 students"),
        (OuterConfig(floor=0.5), 2, "outer.min_weight=0.5: expected between 0 and 1/2"),
        (OuterConfig(every=5), 1, "there is one student"),
        (OuterConfig(step_size=0.5), 2, "outer.step_size=0.5 has no effect without outer.every"),
        (
            OuterConfig(every=5, terms="first", method="central"),
            2,
            "outer.method=central has no effect with outer.terms",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: OuterConfig, students: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OuterLoop(config, students, 10, weigh, HERE, None)


def test_weights_begin_in_proportion_and_stay_where_no_update_is_wanted() -> None:
    outer = OuterLoop(OuterConfig(initial=(1.0, 3.0)), 2, 10, weigh, HERE, None)
    assert outer.weights.tolist() == [0.25, 0.75]
    assert not any(map(outer.due, range(1, 11)))


def test_step_size_falls_as_half_a_cosine() -> None:
    outer = OuterLoop(OuterConfig(every=2), 2, 100, weigh, HERE, None)
    assert [outer.step_size(step) for step in (0, 50, 100)] == pytest.approx([0.25, 0.12625, 0.0025])


@pytest.fixture(scope="module")
def folder(spawn_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What outer_loop_worker.py finds with students in DeepSpeed engines, on one rank and on two."""
    folder = tmp_path_factory.mktemp("outer")
    worker = Path(__file__).with_name("outer_loop_worker.py")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda world_size: spawn_ranks(worker, world_size, folder), (1, 2)))
    return folder


def findings(folder: Path, world_size: int) -> Any:
    return json.loads((folder / f"findings-{world_size}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forward", "backward", "central"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_and_zero_stages_do_not_change_the_hypergradient(folder: Path, stage: int, method: str) -> None:
    if stage > 0 and method != "forward":
        pytest.skip("parameters come the same way for every method")
    expected = findings(folder, 1)["zero0-forward"]
    for world_size in (1, 2):
        ours = findings(folder, world_size)[f"zero{stage}-{method}"]
        for key in ("direct", "own", "peers", "omegas", "losses"):
            tolerance = 5e-3 if method == "central" and key in ("own", "peers") else 1e-5
            assert error(torch.tensor(ours[key]).double(), torch.tensor(expected[key]).double()) <= tolerance, key


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_looking_at_omega_leaves_the_students_bit_for_bit(folder: Path, stage: int) -> None:
    assert findings(folder, 2)[f"zero{stage}-undisturbed"] == []


@pytest.mark.slow
def test_a_run_resumed_from_its_state_ends_with_the_same_weights(folder: Path) -> None:
    found = findings(folder, 1)["resumed"]
    assert found["state"] == found["state_of_whole"]
    assert found["differing"] == []


@pytest.mark.slow
def test_lagged_terms_are_those_of_the_parameters_after_the_step(folder: Path) -> None:
    exact, lagged = (findings(folder, 1)[f"zero0-{inner}"] for inner in ("forward", "lagged"))
    difference = {
        term: error(torch.tensor(lagged[term][0]).double(), torch.tensor(exact[term][0]).double())
        for term in ("direct", "own", "peers")
    }
    assert difference["direct"] == 0
    assert 0.01 < difference["own"] < 0.5
    assert difference["peers"] > 0.01


@pytest.mark.slow
def test_the_preconditioned_inner_step_is_adamws(folder: Path) -> None:
    assert findings(folder, 1)["preconditioned"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["idle", "shuffled"])
def test_a_student_that_cannot_learn_loses_its_weight_and_twins_keep_equal_ones(folder: Path, fault: str) -> None:
    first, second, bad = findings(folder, 1)[f"planted-{fault}"]
    assert bad < 0.5 * first
    assert first == pytest.approx(second, rel=1e-4)
