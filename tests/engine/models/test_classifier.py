import pytest
import torch
import torch.nn.functional as F

from engine.models.base import Shape
from engine.models.classifier import DROPOUT, Classifier
from engine.models.families import new_model
from engine.models.gpt2 import GPT2Shape
from engine.models.llama import LlamaShape
from engine.models.roberta import RobertaShape

SHAPES = (
    LlamaShape(2, 16, 2, 24, kv_heads=2, vocab_size=50, max_length=12, tied=True),
    LlamaShape(2, 16, 2, 24, kv_heads=2, vocab_size=50, max_length=12, tied=False),
    GPT2Shape(2, 16, 2, 24, vocab_size=50, max_length=12, tied=True),
    RobertaShape(2, 16, 2, 24, vocab_size=50, max_length=12, dropout=0.1),
)
TOKENS_BL = torch.arange(5, 17).view(2, 6)
LAST_N = torch.tensor([5, 11])
SEEDS_B = torch.tensor([3, 4])


def classifier(shape: Shape, seed: int = 1) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(new_model(shape), 3, seed)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_logits_are_those_of_babylms_head_on_the_rows_states(shape: Shape) -> None:
    model = classifier(shape).eval()
    states = model.body.states(TOKENS_BL, LAST_N)
    expected = F.layer_norm(F.gelu(model.dense(F.layer_norm(states, (16,)))), (16,))
    stream = model.project(model(TOKENS_BL, LAST_N, SEEDS_B))
    torch.testing.assert_close(F.linear(*stream), model.out(expected))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_every_parameter_learns_and_dropout_is_a_samples_own(shape: Shape) -> None:
    model = classifier(shape)
    hidden_ND = model(TOKENS_BL, LAST_N, SEEDS_B)
    assert 0 < (hidden_ND == 0).float().mean() < 3 * DROPOUT
    assert torch.equal(hidden_ND.flip(0), model(TOKENS_BL.flip(0), LAST_N, SEEDS_B.flip(0)))
    F.cross_entropy(F.linear(*model.project(hidden_ND)), torch.tensor([0, 2])).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    with pytest.raises(ValueError, match="needs dropout_seeds_B"):
        model(TOKENS_BL, LAST_N)


def test_the_seed_draws_the_head_and_nothing_else() -> None:
    state = torch.get_rng_state()
    one, same, other = (classifier(SHAPES[0], seed) for seed in (1, 1, 2))
    assert torch.equal(one.head, same.head)
    assert not torch.equal(one.head, other.head)
    assert torch.equal(torch.get_rng_state(), state)
