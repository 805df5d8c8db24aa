"""torch.compile takes a whole model in one graph, with our kernels inside, and students and teachers train by it."""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import kernels
from engine.models.base import LanguageModel, initial_weights
from engine.models.compiled import compile_body
from engine.models.families import new_model
from engine.models.gpt2 import GPT2Shape
from engine.models.llama import LlamaShape
from engine.models.roberta import RobertaShape

SIZE: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 2, "ffn": 48, "vocab_size": 50, "max_length": 12}
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
TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What is traced from now on; it runs as it is, without code of its own."""
    traced = []

    def recording(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=recording))
    return traced


def model(family: str) -> LanguageModel:
    model = new_model(SHAPES[family])
    initial_weights(model, SIZE["layers"], seed=0)
    return model.to(DEVICE)


@pytest.mark.parametrize("backend", ["auto", "reference", TRITON])
@pytest.mark.parametrize("family", list(SHAPES))
def test_a_model_is_one_graph(family: str, backend: str) -> None:
    eager = model(family)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    weights = [p for p in eager.parameters() if p.requires_grad]

    def hidden_and_gradients(function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        hidden_ND = function(TOKENS)
        gradients = torch.autograd.grad(hidden_ND.pow(3).sum(), weights, allow_unused=True)
        return [hidden_ND, *(g for g in gradients if g is not None)]

    with kernels.backend(backend):
        for a, b in zip(hidden_and_gradients(compiled), hidden_and_gradients(eager), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_another_backend_is_another_graph(graphs: list[torch.fx.GraphModule]) -> None:
    """The choice is part of what was traced, and watched."""
    compiled = torch.compile(lambda x: kernels.swiglu(x, x), fullgraph=True)
    x = torch.ones(2, 4, device=DEVICE)
    for backend in ("reference", "auto", "auto"):
        with kernels.backend(backend):
            compiled(x)
    assert len(graphs) == 2


def test_lengths_share_a_graph_and_rotary_angles_are_its_constants(graphs: list[torch.fx.GraphModule]) -> None:
    """Two graphs: torch takes a first length for the only one."""
    eager, compiled = model("llama"), model("llama")
    compile_body(compiled, learns=False)
    for length in (12, 8, 5, 11):
        tokens_BL = TOKENS[:, :length]
        torch.testing.assert_close(compiled(tokens_BL), eager(tokens_BL), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2
    assert not [node for graph in graphs for node in graph.graph.nodes if node.target is torch.arange]


def test_who_learns_is_compiled_for_that_alone(graphs: list[torch.fx.GraphModule]) -> None:
    student = model("llama")
    compile_body(student, learns=True)
    with torch.no_grad():
        student(TOKENS)
        student(TOKENS[:, :5])
    assert not graphs
    assert student(TOKENS).requires_grad
    assert len(graphs) == 1


def test_who_teaches_is_compiled_without_gradients(graphs: list[torch.fx.GraphModule]) -> None:
    teacher = model("llama")
    with torch.no_grad():
        expected = teacher(TOKENS)
        compile_body(teacher, learns=False)
        torch.testing.assert_close(teacher(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_batches_with_more_or_fewer_rows_share_a_graph(graphs: list[torch.fx.GraphModule]) -> None:
    student = model("roberta")
    compile_body(student, learns=True)
    for rows in (5, 9, 2):
        assert student(TOKENS, torch.arange(rows, device=DEVICE)).shape == (rows, 32)
    assert len(graphs) == 1


def test_there_may_be_more_bodies_than_torch_makes_graphs_of_one_function(graphs: list[torch.fx.GraphModule]) -> None:
    shapes = [replace(SHAPES["llama"], ffn=8 * i) for i in range(1, 12)]
    for shape in shapes:
        teacher = new_model(shape).to(DEVICE)
        compile_body(teacher, learns=False)
        teacher(TOKENS)
    assert len(graphs) == len(shapes)


def test_no_compiler_sees_how_an_embedding_adds_its_gradient_up(graphs: list[torch.fx.GraphModule]) -> None:
    student = model("llama")
    compile_body(student, learns=True)
    student(TOKENS)
    lookups = [str(node.target) for node in graphs[0].graph.nodes if "embedding" in str(node.target)]
    assert [name for name in lookups if "creche" in name]
    assert torch.nn.functional.embedding not in [node.target for node in graphs[0].graph.nodes]


@pytest.mark.slow
def test_the_compilers_code_does_what_the_model_does() -> None:
    eager, student = model("llama"), model("llama")
    compile_body(student, learns=True)
    for each in (eager, student):
        each(TOKENS, torch.arange(3, 17, device=DEVICE)).pow(3).sum().backward()
    for (name, a), b in zip(student.named_parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm(), name
