"""The model against Hugging Face's, and its dropout.

B sequences, L positions, N = B·L tokens, D hidden, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from engine.config.presets import PRESETS
from engine.config.settings import StudentConfig
from engine.models.base import initial_weights
from engine.models.dropout import dropout, dropout_seeds
from engine.models.families import parameter_count, shape_of
from engine.models.gpt2 import GPT2, GPT2Shape
from engine.models.huggingface import hf_weights
from engine.system.errors import UserError

SHAPE = GPT2Shape(layers=2, hidden=32, heads=4, ffn=80, vocab_size=61, max_length=16, norm_eps=1e-3)
TOKENS = torch.randint(SHAPE.vocab_size, (3, 11), generator=torch.Generator().manual_seed(5))
SAMPLES = torch.tensor([40, 7, 1000])


def new_model(shape: GPT2Shape = SHAPE, *, recompute: bool = False) -> GPT2:
    """A model whose weights are large enough for attention to choose and norms and biases to matter."""
    model, generator = GPT2(shape, recompute=recompute), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return model


def gradients(model: GPT2, samples_B: Tensor | None = None, tokens_BL: Tensor = TOKENS) -> dict[str, Tensor]:
    model.zero_grad()
    hidden_ND = model(tokens_BL[:, :-1], None, None if samples_B is None else dropout_seeds(3, samples_B))
    F.cross_entropy(hidden_ND @ model.head.T, tokens_BL[:, 1:].flatten(), reduction="sum").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(("changes", "parameters"), [({}, 704_732_160), ({"max_length": 256}, 704_928_768)])
def test_the_published_shape_has_the_published_size(changes: dict[str, int], parameters: int) -> None:
    settings: dict[str, Any] = PRESETS["gpt2-705m"] | changes
    assert parameter_count(shape_of(StudentConfig(name="a", **settings), 16_000)) == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_equal_hugging_faces(tied: bool) -> None:
    shape = replace(SHAPE, tied=tied)
    ours = new_model(shape)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_embd=shape.hidden,
            n_inner=shape.ffn,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_positions=shape.max_length,
            layer_norm_epsilon=shape.norm_eps,
            tie_word_embeddings=tied,
        )
    ).eval()
    weights = hf_weights(shape, {name: p.detach() for name, p in ours.named_parameters()})
    missing = theirs.load_state_dict(weights, strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    theirs.tie_weights()
    logits_NV = ours(TOKENS) @ ours.head.T
    assert distance(logits_NV, theirs(TOKENS).logits.flatten(0, 1)) <= 1e-5
    logits_NV = theirs(TOKENS[:, :-1]).logits.flatten(0, 1)
    F.cross_entropy(logits_NV, TOKENS[:, 1:].flatten(), reduction="sum").backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    our_gradients = hf_weights(shape, gradients(ours))
    assert our_gradients.keys() == expected.keys()
    for name, gradient in our_gradients.items():
        assert distance(gradient, expected[name]) <= 1e-5, name


def test_dropout_depends_on_the_sample_and_nothing_else() -> None:
    model = new_model(replace(SHAPE, dropout=0.3))
    whole = gradients(model, SAMPLES)
    parts = [gradients(model, SAMPLES[i : i + 1], TOKENS[i : i + 1]) for i in range(3)]
    for name, gradient in whole.items():  # whatever the micro-batch and the rank
        torch.testing.assert_close(gradient, sum(part[name] for part in parts))
    again = gradients(new_model(replace(SHAPE, dropout=0.3), recompute=True), SAMPLES)
    assert all(torch.equal(whole[name], again[name]) for name in whole), "recomputation draws the same"
    other = gradients(model, SAMPLES + 1)
    assert distance(other["h.0.attn.c_attn.weight"], whole["h.0.attn.c_attn.weight"]) > 0.05


def test_dropout_is_off_in_evaluation_and_never_forgotten_in_training() -> None:
    model = new_model(replace(SHAPE, dropout=0.3))
    plain = new_model()(TOKENS)
    assert torch.equal(model.eval()(TOKENS, None, dropout_seeds(3, SAMPLES)), plain)
    with pytest.raises(ValueError, match=r"dropout=0\.3 in training needs dropout_seeds_B"):
        model.train()(TOKENS)
    assert not torch.equal(model(TOKENS, None, dropout_seeds(3, SAMPLES)), plain)


def test_attention_without_dropout_is_what_its_own_path_computes() -> None:
    """The path that draws, with a probability so small that nothing is dropped."""
    hidden_ND = new_model(replace(SHAPE, dropout=1e-9))(TOKENS, None, dropout_seeds(3, SAMPLES))
    torch.testing.assert_close(hidden_ND, new_model()(TOKENS))


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_elements_are_dropped_independently(probability: float) -> None:
    ones = torch.ones(400, 20, 50)
    kept = (dropout(ones, probability, dropout_seeds(1, torch.arange(400)), 3) > 0).float()
    deviation = (probability * (1 - probability)) ** 0.5
    standard = kept.sub(1 - probability).div(deviation)
    assert abs(standard.mean()) * kept.numel() ** 0.5 < 5
    other_site, other_seed = (
        (dropout(ones, probability, dropout_seeds(seed, torch.arange(400)), site) > 0)
        .float()
        .sub(1 - probability)
        .div(deviation)
        for seed, site in ((1, 4), (2, 3))
    )
    neighbours = [
        standard[:-1] * standard[1:],
        standard[:, :-1] * standard[:, 1:],
        standard[..., :-1] * standard[..., 1:],
        standard * other_site,
        standard * other_seed,
    ]
    for products in neighbours:
        assert abs(products.mean()) * products.numel() ** 0.5 < 5
    values = dropout(ones, probability, dropout_seeds(1, torch.arange(400)), 3).unique().tolist()
    assert values == pytest.approx([0, 1 / (1 - probability)])


def test_chosen_rows_and_too_many_positions() -> None:
    model, rows_N = new_model(), torch.tensor([32, 0, 7, 7])
    assert torch.equal(model(TOKENS, rows_N), model(TOKENS)[rows_N])
    with pytest.raises(ValueError, match="17 tokens is longer than the model's max_length=16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(heads=3), "hidden=32 is not divisible by heads=3"),
        (dict(kv_heads=2), "kv_heads=2: a GPT-2 has none"),
        (dict(rope_theta=500.0), "rope_theta=500.0: a GPT-2 has none"),
        (dict(family="llama", dropout=0.1), "dropout=0.1: a LLaMA has none"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    student = dict(name="a", family="gpt2", layers=1, hidden=32, heads=4, ffn=64) | changes
    with pytest.raises(UserError, match=message):
        shape_of(StudentConfig(**student), 61)  # pyright: ignore[reportArgumentType]


def test_initial_weights_are_gpt2s() -> None:
    model = GPT2(replace(SHAPE, hidden=64))
    initial_weights(model, SHAPE.layers, 1)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.full_like(weight, float(name.endswith("weight")))), name
        else:
            expected = 0.02 / (2 if name.endswith("c_proj.weight") else 1)  # √(2·2 layers) = 2
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name
