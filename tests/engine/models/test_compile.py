"""torch.compile takes a whole model in one graph, with our kernels inside."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels
from engine.models.families import Shape, model_of
from engine.models.gpt2 import GPT2Shape
from engine.models.llama import LlamaShape, initialise
from engine.models.roberta import RobertaShape

SIZE: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 2, "ffn": 48, "vocabulary": 50, "positions": 12}
SHAPES = {
    "llama": LlamaShape(**SIZE, kv_heads=1, tied=True),
    "gpt2": GPT2Shape(**SIZE),
    "roberta": RobertaShape(**SIZE),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")
)


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_model_is_one_graph(shape: Shape, backend: str) -> None:
    model = model_of(shape)
    initialise(model, seed=0)
    model.to(DEVICE)
    tokens_BL = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weights = [p for p in model.parameters() if p.requires_grad]

    def hidden_and_gradients(function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        hidden_ND = function(tokens_BL)
        gradients = torch.autograd.grad(hidden_ND.pow(3).sum(), weights, allow_unused=True)
        return [hidden_ND, *(g for g in gradients if g is not None)]

    with kernels.backend(backend):
        for a, b in zip(hidden_and_gradients(compiled), hidden_and_gradients(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_another_backend_is_another_graph() -> None:
    """The choice is part of what was traced, and watched."""
    traced = []

    def recording(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    compiled = torch.compile(lambda x: kernels.swiglu(x, x), fullgraph=True, backend=recording)
    x = torch.ones(2, 4, device=DEVICE)
    for backend in ("reference", "auto", "auto"):
        with kernels.backend(backend):
            compiled(x)
    assert len(traced) == 2


def test_lengths_share_a_graph_and_rotary_angles_are_its_constants() -> None:
    """Two graphs: torch takes a first length for the only one."""
    traced = []

    def recording(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    model = model_of(SHAPES["llama"]).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend=recording)
    for length in (12, 8, 5, 11):
        tokens_BL = torch.arange(2 * length, device=DEVICE).view(2, length)
        torch.testing.assert_close(compiled(tokens_BL), model(tokens_BL), rtol=1e-4, atol=1e-4)
    assert len(traced) == 2
    assert not [node for graph in traced for node in graph.graph.nodes if node.target is torch.arange]
