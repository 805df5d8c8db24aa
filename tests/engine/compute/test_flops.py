"""Counts from shapes against those torch makes of what runs. Its counter knows torch's products, and not those of the
native kernels: hence the reference backend. It counts whole squares for attention."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count

import kernels
from engine.compute.flops import Workload, inference, outer_update, training, training_per_token
from engine.config.settings import OuterConfig
from engine.data.batches import IGNORED, Batch, Step
from engine.models.families import Shape
from engine.models.gpt2 import GPT2, GPT2Shape
from engine.models.llama import Llama, LlamaShape
from engine.models.roberta import Roberta, RobertaShape
from engine.students.coefficients import LossCoefficients
from engine.students.hypergradient import Stream, hypergradient
from kernels import Projected, linear_ensemble_kl

V, B, L = 40, 3, 10
LLAMA = LlamaShape(2, 16, 4, 2, 24, V, 16, tied=True)
GPT_2 = GPT2Shape(2, 16, 2, 64, V, 16)
ROBERTA = RobertaShape(2, 16, 2, 64, V, 16)
SHAPES = [LLAMA, replace(LLAMA, tied=False), GPT_2, replace(GPT_2, dropout=0.1), ROBERTA, replace(ROBERTA, dropout=0.1)]
TOKENS = torch.arange(B * L).view(B, L) % V
ROWS = torch.tensor([0, 4, 9, 17, 25])


def new_model(shape: Shape, *, recompute: bool = False) -> Any:
    return {LlamaShape: Llama, GPT2Shape: GPT2, RobertaShape: Roberta}[type(shape)](shape, recompute=recompute)


def text_of(shape: Shape) -> Workload:
    return Workload(B, L, len(ROWS), len(ROWS), B * L) if isinstance(shape, RobertaShape) else Workload.whole(B, L)


def inputs_of(shape: Shape) -> list[torch.Tensor | None]:
    inputs: list[torch.Tensor | None] = [TOKENS, ROWS if isinstance(shape, RobertaShape) else None]
    return inputs if isinstance(shape, LlamaShape) else [*inputs, torch.arange(B)]


class Counter(TorchDispatchMode):
    """`FlopCounterMode`, whose hooks on modules get in the way of `autograd.grad`, without them; told of addmm_, which
    it misses, and of the attention that torch takes on a CPU."""

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


def unseen(shape: Shape, products: int) -> int:
    """FLOPs of so many of attention's products above the diagonal, where it is causal."""
    pairs = 0 if isinstance(shape, RobertaShape) else L * (L - 1) // 2
    return products * 2 * shape.layers * B * pairs * shape.hidden


def a_step(shape: Shape, *, recompute: bool = False) -> Callable[[], None]:
    model, text = new_model(shape, recompute=recompute), text_of(shape)

    def work() -> None:
        hidden_ND = model(*inputs_of(shape))
        targets_N, one = torch.zeros(text.rows, dtype=torch.int64), torch.ones(1)
        stream = Projected(hidden_ND, model.head, getattr(model, "head_bias", None))
        linear_ensemble_kl([stream], [], targets_N, ce_weight=one, kl_weight=None, normalizer=1).losses[0].backward()

    return work


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_explicit_attention(shape: Shape, recompute: bool) -> None:
    flops = training(shape, text_of(shape), recompute=recompute, explicit=True)
    assert counted(a_step(shape, recompute=recompute)) == flops.hardware
    if not recompute:
        assert flops.hardware == flops.model + unseen(shape, 6)


@pytest.mark.parametrize("shape", [LLAMA, GPT_2, ROBERTA], ids=str)
def test_fused_attention_forms_the_scores_again(shape: Shape) -> None:
    flops = training(shape, text_of(shape))
    assert counted(a_step(shape), fused=True) == flops.hardware + unseen(shape, 7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_teacher(shape: Shape) -> None:
    model = new_model(shape).eval()
    found = inference(shape, text_of(shape), explicit=True)
    with torch.no_grad():
        assert counted(lambda: model(*inputs_of(shape)) @ model.head.T) == found.hardware
    assert found.hardware == found.model + unseen(shape, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_of_the_text(shape: Shape) -> None:
    text = Workload(20, L, 3 * L, 3 * L, 20 * L) if isinstance(shape, RobertaShape) else Workload.whole(20, L)
    assert 20 * L * training_per_token(shape, L) == pytest.approx(training(shape, text).model, abs=20 * L)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ensemble": "probabilities"},
        {"terms": "first"},
        {"terms": "first", "ensemble": "probabilities"},
        {"method": "backward"},
        {"method": "central"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [LLAMA, GPT_2, replace(GPT_2, dropout=0.1), ROBERTA], ids=str)
def test_an_update_of_the_outer_loop(shape: Shape, options: dict[str, Any]) -> None:
    shapes = [shape, replace(shape, layers=1, hidden=8, heads=2)]
    config = OuterConfig(**options)
    streams = [Stream(lambda s=s: new_model(s)) for s in shapes]
    torch.manual_seed(0)
    parameters = [dict(new_model(s).named_parameters()) for s in shapes]
    points = [{n: p.detach() for n, p in own.items()} for own in parameters]
    rows_N = ROWS if isinstance(shape, RobertaShape) else None
    targets_N = TOKENS.flatten()[slice(None) if rows_N is None else rows_N].clone()
    if rows_N is None:
        targets_N[:7] = IGNORED
    batch = Batch(TOKENS, targets_N, rows_N=rows_N, samples_B=torch.arange(B))
    step = Step(1, 0.0, int((targets_N != IGNORED).sum()), B * L, 0, [batch])

    def weigh(omega_S: torch.Tensor) -> LossCoefficients:
        kl_weight_SS = omega_S.expand(2, 2).clone().fill_diagonal_(0)
        return LossCoefficients(omega_S, kl_weight_SS if bool(kl_weight_SS.any()) else None, 1.0, "forward")

    omega_S = torch.tensor([0.4, 0.6], dtype=torch.float64)
    options = {"ensemble": config.ensemble, "terms": config.terms, "method": config.method}
    found = counted(lambda: hypergradient(streams, points, points, [0.1, 0.1], step, step, omega_S, weigh, **options))
    text = Workload.of(step, 1)
    expected = outer_update(shapes, text, text, config)
    for s in shapes:  # explicit in this test: whole squares where the count has triangles, and no scores formed again
        held_out = 2 if config.terms == "first" else 6
        expected = replace(expected, hardware=expected.hardware + unseen(s, held_out) - again(s, config))
        if config.terms == "both" and not getattr(s, "dropout", 0) and config.method != "forward":
            expected = replace(
                expected, hardware=expected.hardware + unseen(s, {"backward": 10, "central": 6}[config.method])
            )
    assert found == expected.hardware


def again(shape: Shape, config: OuterConfig) -> int:
    """The scores that fused attention would form again."""
    times = 0 if config.terms == "first" else 1
    if config.terms == "both" and config.method == "backward" and not getattr(shape, "dropout", 0):
        times += 2
    pairs = L**2 if isinstance(shape, RobertaShape) else L * (L + 1) // 2
    return times * 2 * shape.layers * B * pairs * shape.hidden
