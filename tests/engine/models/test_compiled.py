import functools
from typing import Any

import pytest
import torch

from engine.models import compiled
from engine.models.llama import Llama, LlamaShape, initialise
from engine.models.roberta import Roberta, RobertaShape

SIZE: dict[str, Any] = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 48, "vocabulary": 50, "positions": 12}
TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What has been traced; it runs as it is, without code of its own."""
    traced = []

    def recording(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=recording))
    return traced


def llama() -> Llama:
    model = Llama(LlamaShape(**SIZE, kv_heads=2, tied=True))
    initialise(model, seed=0)
    return model


def test_who_learns_is_compiled_for_that_alone(graphs: list[torch.fx.GraphModule]) -> None:
    model = llama()
    compiled.compile_body(model, learns=True)
    with torch.no_grad():
        model(TOKENS)
        model(TOKENS[:, :5])
    assert not graphs
    assert model(TOKENS).requires_grad
    assert len(graphs) == 1


def test_who_teaches_is_compiled_without_gradients(graphs: list[torch.fx.GraphModule]) -> None:
    model = llama()
    with torch.no_grad():
        expected = model(TOKENS)
        compiled.compile_body(model, learns=False)
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_batches_with_more_or_fewer_rows_share_a_graph(graphs: list[torch.fx.GraphModule]) -> None:
    model = Roberta(RobertaShape(**SIZE))
    compiled.compile_body(model, learns=True)
    for rows in (5, 9, 2):
        assert model(TOKENS, torch.arange(rows)).shape == (rows, 32)
    assert len(graphs) == 1


def test_no_compiler_sees_how_an_embedding_adds_its_gradient_up(graphs: list[torch.fx.GraphModule]) -> None:
    model = llama()
    compiled.compile_body(model, learns=True)
    model(TOKENS).sum().backward()
    called = [str(node.target) for node in graphs[0].graph.nodes if "embedding" in str(node.target)]
    assert [name for name in called if "creche" in name]
    assert torch.nn.functional.embedding not in [node.target for node in graphs[0].graph.nodes]


@pytest.mark.slow
def test_the_compilers_code_does_what_the_model_does() -> None:
    eager, model = llama(), llama()
    compiled.compile_body(model, learns=True)
    for each in (eager, model):
        each(TOKENS, torch.arange(3, 17)).pow(3).sum().backward()
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm(), name
