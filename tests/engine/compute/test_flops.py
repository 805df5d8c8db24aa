"""FLOPs counted from shapes equal those that torch counts while the models run.

torch's counter does not know the products inside native kernels, so these tests take the reference backend. It counts
whole squares for attention.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count

import kernels
from engine.compute.flops import Workload, inference, outer_update, training, training_per_token
from engine.config.settings import ObjectiveConfig, OuterConfig
from engine.data.batches import IGNORED, Batch, Step
from engine.models.base import Shape
from engine.models.families import new_model
from engine.models.gpt2 import GPT2Shape
from engine.models.llama import LlamaShape
from engine.models.roberta import RobertaShape
from engine.students.coefficients import LossWeighting
from engine.students.hypergradient import FunctionalStudent, hypergradient
from kernels import linear_ensemble_kl

V, B, L = 40, 3, 10
LLAMA = LlamaShape(2, 16, 4, 24, V, 16, kv_heads=2)
GPT_2 = GPT2Shape(2, 16, 2, 64, V, 16)
ROBERTA = RobertaShape(2, 16, 2, 64, V, 16)
SHAPES = [LLAMA, replace(LLAMA, tied=False), GPT_2, replace(GPT_2, dropout=0.1), ROBERTA, replace(ROBERTA, dropout=0.1)]
TOKENS = torch.arange(B * L).view(B, L) % V
ROWS = torch.tensor([0, 4, 9, 17, 25])


def workload_of(shape: Shape) -> Workload:
    return Workload.whole(B, L) if shape.causal else Workload(B, L, len(ROWS), len(ROWS), B * L)


def inputs_of(shape: Shape) -> list[torch.Tensor | None]:
    return [TOKENS, None if shape.causal else ROWS, torch.arange(B)]


class Counter(TorchDispatchMode):
    """Counts as torch's `FlopCounterMode` does, but without its hooks on modules, which disturb `autograd.grad`.

    It also knows addmm_, which torch's own misses, and the attention that torch takes on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        aten, self.flops = torch.ops.aten, 0
        more: Any = {
            aten.addmm_: lambda out, left, right, *_, **__: addmm_flop(out, left, right),
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                lambda d_out, q, k, v, *_, **__: sdpa_backward_flop_count(d_out, q, k, v)
            ),
        }
        self.formulas = FlopCounterMode(display=False, custom_mapping=more).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.formulas:
            self.flops += self.formulas[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def counted(work: Callable[[], object], *, fused: bool = False) -> int:
    attention = nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
    with kernels.backend("reference"), attention, Counter() as counter:
        work()
    return counter.flops


def above_diagonal(shape: Shape, products: int) -> int:
    """Returns the FLOPs above the diagonal, which a causal mask hides, in that many of attention's products."""
    pairs = L * (L - 1) // 2 if shape.causal else 0
    return products * 2 * shape.layers * B * pairs * shape.hidden


def step_of(shape: Shape, *, recompute: bool = False) -> Callable[[], None]:
    model, rows = new_model(shape, recompute=recompute), workload_of(shape).rows

    def work() -> None:
        hidden_ND = model(*inputs_of(shape))
        targets_N, ce_weight = torch.zeros(rows, dtype=torch.int64), torch.ones(1)
        stream = model.project(hidden_ND)
        result = linear_ensemble_kl([stream], [], targets_N, ce_weight=ce_weight, kl_weight=None, normalizer=1)
        result.losses[0].backward()

    return work


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unfused_attention(shape: Shape, recompute: bool) -> None:
    flops = training(shape, workload_of(shape), recompute=recompute, unfused=True)
    assert counted(step_of(shape, recompute=recompute)) == flops.hardware
    if not recompute:
        assert flops.hardware == flops.model + above_diagonal(shape, 6)


@pytest.mark.parametrize("shape", [LLAMA, GPT_2, ROBERTA], ids=str)
def test_fused_attention_forms_the_scores_again(shape: Shape) -> None:
    flops = training(shape, workload_of(shape))
    assert counted(step_of(shape), fused=True) == flops.hardware + above_diagonal(shape, 7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_teacher(shape: Shape) -> None:
    model = new_model(shape).eval()
    flops = inference(shape, workload_of(shape), unfused=True)
    with torch.no_grad():
        assert counted(lambda: model(*inputs_of(shape)) @ model.head.T) == flops.hardware
    assert flops.hardware == flops.model + above_diagonal(shape, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_of_the_text(shape: Shape) -> None:
    workload = Workload.whole(20, L) if shape.causal else Workload(20, L, 3 * L, 3 * L, 20 * L)
    assert 20 * L * training_per_token(shape, L) == pytest.approx(training(shape, workload).model, abs=20 * L)


@pytest.mark.parametrize("terms", ["all", "direct"])
@pytest.mark.parametrize("shape", [LLAMA, GPT_2, replace(GPT_2, dropout=0.1), ROBERTA], ids=str)
def test_an_update_of_the_outer_loop(shape: Shape, terms: Literal["all", "direct"]) -> None:
    shapes = [shape, replace(shape, layers=1, hidden=8, heads=2)]
    torch.manual_seed(0)
    parameters = [{n: p.detach() for n, p in new_model(s).named_parameters()} for s in shapes]
    rows_N = None if shape.causal else ROWS
    targets_N = TOKENS.flatten()[slice(None) if rows_N is None else rows_N].clone()
    if rows_N is None:
        targets_N[:7] = IGNORED
    batch = Batch(TOKENS, targets_N, rows_N=rows_N, samples_B=torch.arange(B))
    step = Step(1, 0.0, int((targets_N != IGNORED).sum()), B * L, 0, [batch])
    weighting = LossWeighting(ObjectiveConfig(weighted=True), 2, torch.device("cpu"))

    def update() -> None:
        functional = [FunctionalStudent(s) for s in shapes]
        omega_S = torch.tensor([0.4, 0.6], dtype=torch.float64)
        hypergradient(functional, parameters, parameters, [0.1, 0.1], step, step, omega_S, weighting, terms=terms)

    workload = Workload.of_step(step, 1)
    expected = outer_update(shapes, workload, workload, OuterConfig(terms=terms)).hardware
    for s in shapes:  # Here attention multiplies whole squares where the count has triangles, and keeps the scores.
        expected += above_diagonal(s, 2 if terms == "direct" else 6)
        if terms == "all":
            pairs = L * (L + 1) // 2 if s.causal else L**2
            expected -= 2 * s.layers * B * pairs * s.hidden
    assert counted(update) == expected
