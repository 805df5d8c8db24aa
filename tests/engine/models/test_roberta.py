"""The model against Hugging Face's.

B sequences, L positions, N = B·L tokens, D hidden, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForMaskedLM

from engine.config.presets import PRESETS
from engine.config.settings import StudentConfig
from engine.data.batches import Batch
from engine.models import families, roberta
from engine.models.dropout import dropout_seeds
from engine.models.roberta import Roberta, RobertaShape
from engine.students.hypergradient import FunctionalStudent
from engine.system.errors import UserError

SHAPE = RobertaShape(layers=2, hidden=32, heads=4, ffn=48, vocab_size=61, max_length=16, norm_eps=1e-3)
TOKENS = torch.randint(2, SHAPE.vocab_size, (3, 11), generator=torch.Generator().manual_seed(5))
ROWS = torch.tensor([30, 0, 7, 19])
TARGETS = torch.tensor([3, 60, 1, 9])


def new_model(shape: RobertaShape = SHAPE, *, recompute: bool = False) -> Roberta:
    """A model whose weights are large enough for attention to choose and norms and biases to matter."""
    model = Roberta(shape, recompute=recompute)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def gradients(model: Roberta, *inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(TOKENS, ROWS, *inputs) @ model.head.T + model.head_bias, TARGETS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def theirs_of(ours: Roberta) -> RobertaForMaskedLM:
    shape = ours.shape
    theirs = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.max_length + 2,
            layer_norm_eps=shape.norm_eps,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    theirs.set_attn_implementation("eager")
    weights = {hf_name(name): parameter.detach() for name, parameter in ours.named_parameters()}
    missing = theirs.load_state_dict(weights, strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    theirs.tie_weights()
    return theirs


def hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"roberta.{name}"


@pytest.mark.parametrize(
    ("preset", "millions"), [("babies-60m", 59.9), ("babies-43m", 42.6), ("babies-28m", 27.8), ("babies-24m", 24.2)]
)
def test_the_papers_students_have_the_papers_sizes(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = families.new_model(families.shape_of(StudentConfig(name="a", **PRESETS[preset]), vocab_size=50_265))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_logits_and_gradients_equal_hugging_faces() -> None:
    ours = new_model()
    theirs = theirs_of(ours)
    logits_NV = ours(TOKENS) @ ours.head.T + ours.head_bias
    assert distance(logits_NV, theirs(TOKENS).logits.flatten(0, 1)) <= 1e-5
    ours, theirs = ours.double(), theirs.double()
    F.cross_entropy(theirs(TOKENS).logits.flatten(0, 1)[ROWS], TARGETS).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    our_gradients = gradients(ours)
    assert {hf_name(name) for name in our_gradients} == expected.keys()
    for name, gradient in our_gradients.items():
        if not name.endswith("key.bias"):  # it shifts all scores of a query alike: its gradient is rounding
            assert distance(gradient, expected[hf_name(name)]) <= 1e-10, name


def test_chosen_rows_are_the_rows_of_the_whole_and_the_rest_is_not_transformed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, transformed = new_model(), []
    forward = roberta.Head.forward
    monkeypatch.setattr(roberta.Head, "forward", lambda self, x: transformed.append(len(x)) or forward(self, x))
    assert distance(model(TOKENS, ROWS), model(TOKENS)[ROWS]) <= 1e-6
    assert transformed == [len(ROWS), TOKENS.numel()]


def test_dropout_is_a_sequences_own_and_recomputing_repeats_it() -> None:
    shape, seeds_B = replace(SHAPE, dropout=0.3), dropout_seeds(1, torch.arange(3))
    model = new_model(shape)
    whole = model(TOKENS, None, seeds_B).unflatten(0, TOKENS.shape)
    alone = torch.stack([model(TOKENS[i : i + 1], None, seeds_B[i : i + 1]) for i in range(3)])
    assert distance(alone, whole) <= 1e-6
    assert distance(model.eval()(TOKENS), whole.flatten(0, 1)) > 0.1
    kept, again = gradients(new_model(shape), seeds_B), gradients(new_model(shape, recompute=True), seeds_B)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    with pytest.raises(ValueError, match="needs dropout_seeds_B"):
        new_model(shape)(TOKENS)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_mode_reaches_every_parameter_and_the_heads_bias(dropout: float) -> None:
    """What the outer loop needs: the tangent of the logits equals a difference of them, under the same dropout."""
    shape = replace(SHAPE, dropout=dropout)
    point = {name: p.detach().double() for name, p in new_model(shape).named_parameters()}
    generator = torch.Generator().manual_seed(7)
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in point.items()}
    batch = Batch(TOKENS, TARGETS, ROWS, samples_B=torch.arange(3))
    student = FunctionalStudent(shape, seed=1)

    def logits(moved: float) -> Tensor:
        hidden, weight, bias = student.forward_with({n: p + moved * direction[n] for n, p in point.items()}, batch)
        return hidden @ weight.T + bias

    (hidden, weight, _), (hidden_dot, weight_dot, bias_dot) = student.tangent(point, direction, batch)
    tangent = hidden_dot @ weight.T + hidden @ weight_dot.T + bias_dot
    assert distance(tangent, (logits(1e-6) - logits(-1e-6)) / 2e-6) <= 1e-6


def test_shapes_and_sequences_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="hidden=30 is not divisible by heads=4"):
        replace(SHAPE, hidden=30)
    with pytest.raises(ValueError, match="17 tokens is longer than the model's max_length=16"):
        new_model()(torch.zeros(1, 17, dtype=torch.int64))
