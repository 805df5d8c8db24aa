import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from engine.config.settings import StudentConfig, TokenizerConfig
from engine.data import tokenizer as tokenization
from engine.data.grammar.generator import generate
from engine.data.tokenizer import Tokenizer
from engine.models import huggingface
from engine.models.base import LanguageModel, Shape
from engine.models.families import new_model
from engine.models.gpt2 import GPT2Shape
from engine.models.huggingface import export_model, import_weights, load_model
from engine.models.llama import LlamaShape
from engine.models.roberta import RobertaShape
from engine.system.errors import UserError

PIECES = 360
CONFIG = StudentConfig("a", 2, 32, 4, 48, kv_heads=2, max_length=64, rope_theta=500.0, norm_eps=1e-3)
SHAPE = LlamaShape.from_settings(CONFIG, PIECES)
TEXTS = ["a dog sleeps .", "two\nlines", "\nfirst empty", "*MOT:\tlook !\n\n", "  Zwölf <s> ﬁne 猫 ", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenization.train(generate(0, 3000), TokenizerConfig(), PIECES, folder, boundary=True)


def weights_of(shape: Shape) -> tuple[LanguageModel, dict[str, Tensor]]:
    model, generator = new_model(shape), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model, {name: parameter.detach() for name, parameter in model.named_parameters()}


def exported_to_transformers(
    auto: Any, folder: Path, shape: Shape, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> Any:
    """Returns what transformers loads from the folder that the student was exported to, with every weight in place."""
    export_model(folder, shape, weights, tokenizer)
    theirs, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return theirs


def assert_comes_back(
    theirs: Any, folder: Path, shape: Shape, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Asserts that the student's folder, and one that transformers writes beside it, hold its shape and weights."""
    elsewhere = folder.with_name("elsewhere")
    theirs.save_pretrained(elsewhere)  # as transformers writes it
    tokenizer.export(elsewhere)
    for path in (folder, elsewhere):
        model, _ = load_model(path)
        assert model.shape == replace(shape, dropout=0.0), "dropout is a setting of training"
        loaded = dict(model.named_parameters())
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


@pytest.fixture
def exported(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    export_model(tmp_path / "student", SHAPE, weights_of(SHAPE)[1], tokenizer)
    return tmp_path / "student"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_transformers_loads_the_folder_and_computes_the_same_logits(
    tokenizer: Tokenizer, tmp_path: Path, tied: bool, kv_heads: int
) -> None:
    shape = replace(SHAPE, tied=tied, kv_heads=kv_heads)
    ours, weights = weights_of(shape)
    theirs = exported_to_transformers(AutoModelForCausalLM, tmp_path / "student", shape, weights, tokenizer)
    assert theirs.dtype == torch.float32
    ids = tokenizer.encode(next(generate(1, 10)))[: shape.max_length - 1]
    tokens_BL = torch.tensor([[tokenizer.boundary, *ids]])
    with torch.no_grad():
        difference = ours(tokens_BL) @ ours.head.T - theirs(tokens_BL).logits[0]
    assert tokens_BL.shape[1] > 30
    assert difference.abs().max() <= 1e-4
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (tokenizer.boundary, tokenizer.boundary)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-bpe"])
@pytest.mark.parametrize("boundary", [True, False])
def test_the_folders_tokenizer_gives_the_engines_ids_after_the_boundary(
    tmp_path: Path, kind: Any, boundary: bool
) -> None:
    texts = list(generate(0, 3000))
    ours = tokenization.train(texts, TokenizerConfig(kind=kind), PIECES, tmp_path, boundary=boundary)
    export_model(tmp_path / "student", SHAPE, weights_of(SHAPE)[1], ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "student")
    front = [ours.boundary] if boundary else []
    for text in [*TEXTS, *texts[:20]]:
        assert theirs(text)["input_ids"] == front + ours.encode(text), text
    assert len(theirs) == ours.vocab_size == PIECES
    assert theirs.bos_token_id == theirs.eos_token_id == ours.boundary


@pytest.mark.parametrize("tied", [True, False])
def test_a_student_comes_back_bit_for_bit(tokenizer: Tokenizer, tmp_path: Path, tied: bool) -> None:
    shape = replace(SHAPE, tied=tied)
    _, weights = weights_of(shape)
    export_model(tmp_path / "student", shape, weights, tokenizer)
    config = replace(CONFIG, init=str(tmp_path / "student"))
    state = import_weights(config, replace(shape, max_length=32), tokenizer)  # fewer positions: the same weights
    assert state.keys() == {f"weight/{name}" for name in weights}
    assert all(torch.equal(state[f"weight/{name}"], weight) for name, weight in weights.items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt2_is_the_same_in_transformers_and_comes_back_bit_for_bit(
    tokenizer: Tokenizer, tmp_path: Path, tied: bool
) -> None:
    shape = GPT2Shape(layers=2, hidden=32, heads=4, ffn=48, vocab_size=PIECES, max_length=64, tied=tied, dropout=0.2)
    ours, weights = weights_of(shape)
    theirs = exported_to_transformers(AutoModelForCausalLM, tmp_path / "student", shape, weights, tokenizer)
    assert theirs.config.resid_pdrop == theirs.config.attn_pdrop == theirs.config.embd_pdrop == 0.2
    tokens_BL = torch.tensor([tokenizer.encode(next(generate(1, 10)))[:60]])
    with torch.no_grad():
        difference = ours.eval()(tokens_BL) @ ours.head.T - theirs.eval()(tokens_BL).logits[0]
    assert difference.abs().max() <= 1e-4
    assert_comes_back(theirs, tmp_path / "student", shape, weights, tokenizer)


def test_a_roberta_is_the_same_in_transformers_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    config = TokenizerConfig(mask=True)
    tokenizer = tokenization.train(generate(0, 3000), config, PIECES, tmp_path, boundary=True)
    shape = RobertaShape(layers=2, hidden=32, heads=4, ffn=48, vocab_size=PIECES, max_length=64, dropout=0.2)
    ours, weights = weights_of(shape)
    theirs = exported_to_transformers(AutoModelForMaskedLM, tmp_path / "student", shape, weights, tokenizer)
    assert theirs.config.hidden_dropout_prob == theirs.config.attention_probs_dropout_prob == 0.2
    ids = AutoTokenizer.from_pretrained(tmp_path / "student")("the dog <mask> a cat").input_ids
    tokens_BL = torch.tensor([[*ids, *tokenizer.encode(next(generate(1, 10))), tokenizer.mask][:64]])
    with torch.no_grad():
        difference = F.linear(*ours.eval().project(ours(tokens_BL))) - theirs.eval()(tokens_BL).logits[0]
    assert difference.abs().max() <= 1e-4
    assert_comes_back(theirs, tmp_path / "student", shape, weights, tokenizer)
    start = StudentConfig("a", 2, 32, 4, 48, max_length=64, family="roberta", init=str(tmp_path / "student"))
    assert len(import_weights(start, shape, tokenizer)) == len(weights)


def test_bf16_weights_are_exported_as_the_fp32_that_the_config_promises(tokenizer: Tokenizer, tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in weights_of(SHAPE)[1].items()}
    export_model(tmp_path / "student", SHAPE, weights, tokenizer)
    stored = load_file(tmp_path / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def edit_config(**changed: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return edit


def drop_setting(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), r"no config\.json; expected"),
        (remove("model.safetensors"), r"no model\.safetensors; expected"),
        (remove("tokenizer.json"), r"no tokenizer\.json; expected"),
        (lambda folder: shutil.rmtree(folder), r"no config\.json; expected"),
        (truncate("model.safetensors"), r"model\.safetensors is damaged"),
        (truncate("config.json"), r"config\.json"),
        (edit_config(model_type="mistral"), r"model_type='mistral': expected 'llama'"),
        (edit_config(num_hidden_layers=3), r"shape .*layers=3.* is not the student's .*layers=2"),
        (edit_config(rms_norm_eps=1e-6), r"shape .*norm_eps=1e-06.* is not the student's"),
        (drop_setting("num_hidden_layers"), r"config\.json .*num_hidden_layers"),
        (edit_config(attention_bias=True), "attention_bias=True: this LLaMA has only False"),
        (edit_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}), "rotary"),
        (edit_config(rope_parameters=None, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0}), "rotary"),
        (edit_config(hidden_act="gelu"), "hidden_act"),
        (edit_config(head_dim=16), "head_dim|shape"),
        (edit_tensors(lambda tensors: tensors.pop("model.norm.weight")), r"model\.norm\.weight|norm\.weight"),
        (edit_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(1)})), r"norm\.weight"),
        (edit_tensors(lambda tensors: tensors["model.norm.weight"].fill_(float("inf"))), r"norm\.weight is not finite"),
        (edit_tensors(lambda tensors: tensors.update({"model.norm.bias": torch.ones(32)})), r"norm\.bias"),
    ],
)
def test_an_import_of_something_else_is_refused(
    exported: Path, tokenizer: Tokenizer, damage: Callable[[Path], object], message: str
) -> None:
    damage(exported)
    with pytest.raises(UserError, match=message) as caught:
        import_weights(replace(CONFIG, init=str(exported)), SHAPE, tokenizer)
    assert str(caught.value).startswith(f"students.a.init={exported}: ")
    assert "\n" not in str(caught.value)


def test_an_import_with_another_tokenizer_is_refused(exported: Path, tmp_path: Path) -> None:
    other = tokenization.train(generate(9, 3000), TokenizerConfig(), PIECES, tmp_path, boundary=True)
    with pytest.raises(UserError, match=f"is not the data's \\({other.hash[:8]}\\)"):
        import_weights(replace(CONFIG, init=str(exported)), SHAPE, other)


def test_a_full_disk_leaves_the_former_folder_as_it_was(
    exported: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}

    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(UserError, match=r"could not be written \(.*No space left on device\): make room"):
        export_model(exported, SHAPE, weights_of(SHAPE)[1], tokenizer)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert list(exported.parent.iterdir()) == [exported]


def test_an_export_replaces_the_whole_former_folder(exported: Path, tokenizer: Tokenizer) -> None:
    (exported / "stale").touch()
    export_model(exported, replace(SHAPE, norm_eps=1e-5), weights_of(SHAPE)[1], tokenizer)
    assert not (exported / "stale").exists()
    assert json.loads((exported / "config.json").read_text())["rms_norm_eps"] == 1e-5
