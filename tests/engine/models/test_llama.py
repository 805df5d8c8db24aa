"""The model against Hugging Face's, and what the engine relies on beyond that.

B sequences, L positions, N = B·L tokens, D hidden, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import kernels
from engine.config.presets import PRESETS
from engine.config.settings import StudentConfig
from engine.models import llama
from engine.models.base import initial_weights
from engine.models.huggingface import hf_weights
from engine.models.llama import Llama, LlamaShape
from engine.system.errors import UserError

# Grouped queries, and neither of Hugging Face's defaults for rotary positions and norms.
SHAPE = LlamaShape(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    ffn=48,
    vocab_size=61,
    max_length=16,
    tied=True,
    rope_theta=500.0,
    norm_eps=1e-3,
)
TOKENS = torch.randint(SHAPE.vocab_size, (3, 11), generator=torch.Generator().manual_seed(5))
TOLERANCE = 1e-5


def new_model(shape: LlamaShape = SHAPE, *, recompute: bool = False) -> Llama:
    """A model whose weights are large enough for attention to choose and norms to matter."""
    model = Llama(shape, recompute=recompute)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def logits(model: Llama, tokens_BL: Tensor, **arguments: Any) -> Tensor:
    return model(tokens_BL, **arguments) @ model.head.T


def gradients(model: Llama) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(logits(model, TOKENS[:, :-1]), TOKENS[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("baby-llama-58m", 58_343_936), ("llama-360m", 359_973_888), ("smol-llama-345m", 345_355_200)],
)
def test_published_shapes_have_the_published_sizes(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Llama(LlamaShape.from_settings(StudentConfig(name="a", **PRESETS[preset]), vocab_size=16_000))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_and_gradients_equal_hugging_faces(tied: bool, kv_heads: int) -> None:
    shape = replace(SHAPE, tied=tied, kv_heads=kv_heads)
    ours = new_model(shape)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=shape.max_length,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},  # pyright: ignore[reportArgumentType]
            tie_word_embeddings=tied,
        )
    )
    theirs.set_attn_implementation("eager")
    missing = theirs.load_state_dict(
        hf_weights(shape, {n: p.detach() for n, p in ours.named_parameters()}), strict=False
    )
    assert missing.unexpected_keys == []
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    theirs.tie_weights()

    ours_NV, theirs_NV = logits(ours, TOKENS), theirs(TOKENS).logits.flatten(0, 1)
    assert distance(ours_NV, theirs_NV) <= TOLERANCE
    F.cross_entropy(theirs(TOKENS[:, :-1]).logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    expected_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    our_gradients = hf_weights(shape, gradients(ours))
    assert our_gradients.keys() == expected_gradients.keys()
    for name, gradient in our_gradients.items():
        assert distance(gradient, expected_gradients[name]) <= TOLERANCE, name


def test_chosen_rows_are_the_rows_of_the_whole() -> None:
    model, rows_N = new_model(), torch.tensor([32, 0, 7, 7])
    assert torch.equal(model(TOKENS, rows_N=rows_N), model(TOKENS)[rows_N])


def test_recomputing_activations_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    swiglu = kernels.swiglu
    monkeypatch.setattr(kernels, "swiglu", lambda *x: calls.append(1) or swiglu(*x))
    kept, again = gradients(new_model()), gradients(new_model(recompute=True))
    assert len(calls) == (1 + 2) * SHAPE.layers, "the second model runs every block twice"
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    assert new_model()(torch.zeros(1, 16, dtype=torch.int64)).shape == (16, 32)
    with pytest.raises(ValueError, match="17 tokens is longer than the model's max_length=16"):
        new_model()(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(hidden=30), "hidden=30 is not divisible by heads=4"),
        (dict(hidden=12), "hidden/heads=3 is odd"),
        (dict(kv_heads=3), "heads=4 is not divisible by kv_heads=3"),
    ],
)
def test_a_shape_that_does_not_fit_together_is_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SHAPE, **changed)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.randint(1000, ()).item())  # pyright: ignore[reportArgumentType]
        model = Llama(replace(SHAPE, hidden=64, tied=False))
        initial_weights(model, SHAPE.layers, seed)
        return dict(model.state_dict())

    first, again, other = drawn(1), drawn(1), drawn(2)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        assert not torch.equal(weight, other[name])
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert weight.std().item() == pytest.approx(0.02 / (2 if into_residual else 1), rel=0.1)  # √(2·2 layers) = 2


def test_rotary_tables_stay_fp32_in_a_bf16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    rotary = kernels.rotary
    monkeypatch.setattr(kernels, "rotary", lambda q, k, *table: seen.append((q.dtype, *table)) or rotary(q, k, *table))
    model = new_model().to(torch.bfloat16)
    assert model(TOKENS).dtype == torch.bfloat16
    angle_Ld = torch.arange(11).double()[:, None] / 500.0 ** (torch.arange(4).double() / 4)
    for dtype, cos, sin in seen:
        assert dtype == torch.bfloat16
        assert torch.equal(cos, angle_Ld.cos().float())
        assert torch.equal(sin, angle_Ld.sin().float())


def test_tables_made_in_inference_mode_serve_training_afterwards() -> None:
    llama._rotary_table.cache_clear()
    model = new_model()
    with torch.inference_mode():
        model(TOKENS[:, :-1])
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
