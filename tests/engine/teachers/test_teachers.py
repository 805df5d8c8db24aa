"""Runs that learn from frozen teachers, live and from a cache, and the refusal of what cannot be a teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.loading import build
from engine.config.settings import Config
from engine.data.batches import Batch
from engine.models.llama import Llama, LlamaShape
from engine.run import checkpoint
from engine.run.run import Run
from engine.system.errors import UserError
from engine.teachers import cache as teacher_cache
from engine.teachers.teachers import Teachers
from engine.train import train
from kernels import Projected

TINY = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "max_length": 32}
VOCAB_SIZE = 400


def settings(folder: Path, name: str, *overrides: str, **student: Any) -> Config:
    config = {
        "students": [{"name": "one", "learning_rate": 1e-2, **TINY, **student}],
        "run": {"name": name, "folder": str(folder / "runs")},
        "data": {"folder": str(folder / "prepared"), "words": 3000, "tokenizer": {"vocab_size": VOCAB_SIZE}},
        "optimizer": {"warmup": 1},
        "train": {"steps": 6, "batch": 4, "length": 32},
        "evaluation": {"every": 100, "tokens": 100, "pairs": "none", "samples": 1, "sample_tokens": 4},
    }
    return build(Config, config, overrides)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains two teachers of different families and widths for some steps."""
    folder = tmp_path_factory.mktemp("teachers")
    train(settings(folder, "llama", hidden=24, tied=False))
    train(settings(folder, "gpt2", family="gpt2", dropout=0.1, seed=1))
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """Returns a copy of the teachers, to spoil."""
    shutil.copytree(models, tmp_path / "copy")
    return tmp_path / "copy"


def distilled(folder: Path, name: str, *overrides: str, teachers: tuple[str, ...] = ("llama", "gpt2")) -> Config:
    paths = ", ".join(f"{{path: {folder / 'runs' / t}}}" for t in teachers)
    return settings(
        folder, name, f"teachers=[{paths}]", "objective.ce_weight=0.5", "objective.temperature=2", *overrides
    )


def steps(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def losses(folder: Path, name: str) -> list[float]:
    return [step["students"]["one"]["loss"] for step in steps(folder, name)]


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not (Path(config.run.folder) / config.run.name).exists(), "before anything is written"
    return str(caught.value)


def test_one_averaged_teacher_or_each_by_itself(folder: Path) -> None:
    train(distilled(folder, "mean", "objective.teacher_weight=0.25"))
    train(distilled(folder, "each", "objective.teacher_weight=0.25", "objective.mix=each", "teachers.1.weight=3"))
    lines = (folder / "runs" / "each" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["teachers"] == ["llama", "gpt2"]
    for name, weights in (("mean", [0.25]), ("each", [0.25 / 4, 0.75 / 4])):
        for step in steps(folder, name):
            kl = step["kl"][0]
            assert kl[0] == 0
            expected = 0.5 * step["students"]["one"]["ce"] + 4 * sum(
                w * k for w, k in zip(weights, kl[1:], strict=True)
            )
            assert step["students"]["one"]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_mean_of_teachers_is_of_their_logits_and_holds_their_heads_once(tied: bool) -> None:
    torch.manual_seed(0)
    models = [
        Llama(LlamaShape(1, width, 2, 32, VOCAB_SIZE, max_length=16, tied=tied, kv_heads=2)).requires_grad_(False)
        for width in (16, 24)
    ]
    batch = Batch(torch.randint(VOCAB_SIZE, (2, 16)), torch.zeros(32, dtype=torch.int64))
    expected_NV = sum(w * model(batch.tokens_BL) @ model.head.T for w, model in zip((0.25, 0.75), models, strict=True))
    (mean,) = Teachers(["mean"], [1.0], models, (0.25, 0.75))(batch)
    assert isinstance(mean, Projected)
    torch.testing.assert_close(mean.hidden @ mean.weight.T, expected_NV)
    storages = {model.head.untyped_storage().data_ptr() for model in models}
    assert storages == {mean.weight.untyped_storage().data_ptr()}


def test_the_papers_reduction_counts_the_last_position_too(folder: Path) -> None:
    train(distilled(folder, "paper", "objective.reduction=sequence", "objective.kl_everywhere=true"))
    for number, step in enumerate(steps(folder, "paper"), 1):
        assert step["tokens"] == number * 4 * 31, "of 32 positions one has no target"
        student, (_, kl) = step["students"]["one"], step["kl"][0]
        assert student["loss"] == pytest.approx(0.5 * student["ce"] + 4 * 31 * kl, rel=1e-5)


def test_teachers_are_frozen_and_whole_beside_zero_3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    finish = Run.finish
    monkeypatch.setattr(Run, "finish", lambda self: (seen.append(self.teachers), finish(self)))
    train(distilled(folder, "sharded", "train.zero_stage=3"))
    train(distilled(folder, "whole", "train.zero_stage=0"))
    assert losses(folder, "sharded") == pytest.approx(losses(folder, "whole"), rel=1e-6)
    for name, model in zip(("llama", "gpt2"), seen[0]._models, strict=True):
        stored = load_file(folder / "runs" / name / "students" / "one" / "model.safetensors")
        assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in stored.values())
        assert not model.training
        for parameter in model.parameters():
            assert not parameter.requires_grad
            assert not hasattr(parameter, "ds_id"), "DeepSpeed has its hands on it"


def test_dropout_and_teachers_resume_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> Config:
        student = ("students.0.family=gpt2", "students.0.dropout=0.2", "checkpoint.every=2", "train.micro_batch=2")
        return distilled(folder, name, *student, f"cache.path={folder / 'cache'}")

    class Killed(BaseException):
        pass

    def dying(self: Run, step: Any, *rest: Any) -> None:
        record(self, step, *rest)
        if step.number == 3:
            raise Killed

    train(config("through"))
    record = Run.after_step
    with monkeypatch.context() as patch:
        patch.setattr(Run, "after_step", dying)
        with pytest.raises(Killed):
            train(config("broken"))
    train(config("broken"))
    ends = [
        checkpoint.read_student(checkpoint.at_step(folder / "runs" / name / "checkpoints", 6), "one")
        for name in ("through", "broken")
    ]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_run_does_not_go_on_with_another_teacher(folder: Path) -> None:
    train(distilled(folder, "taught"))
    path = folder / "runs/llama/students/one/model.safetensors"
    tensors = load_file(path)
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match=r"has learnt from other teachers than .*llama.* now hold: restore them"):
        train(distilled(folder, "taught"))
    save_file(tensors, path, metadata={"format": "pt"})
    train(distilled(folder, "taught"))


def spoil_weights(folder: Path) -> None:
    path = folder / "runs/llama/students/one/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, path)


def spoil_config(**changed: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "runs/llama/students/one/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return spoil


def widen_vocabulary(folder: Path) -> None:
    path = folder / "runs/llama/students/one/model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, path)
    spoil_config(vocab_size=VOCAB_SIZE + 8)(folder)


@pytest.mark.parametrize(
    ("spoil", "overrides", "expected"),
    [
        (
            lambda f: (f / "runs/llama/students/one/model.safetensors").unlink(),
            [],
            "llama: no model.safetensors; expec",
        ),
        (lambda f: (f / "runs/llama/students/one/tokenizer.json").unlink(), [], "llama: no tokenizer.json; expected"),
        (lambda f: shutil.rmtree(f / "runs/llama"), [], "llama: no config.json; expected a Hugging Face folder"),
        (spoil_weights, [], "llama: layers.0.mlp.up_proj.weight is not finite (NaN or infinite)"),
        (spoil_config(model_type="mamba"), [], "llama: model_type='mamba': expected 'llama', 'gpt2' or 'roberta'"),
        (spoil_config(max_position_embeddings=16), [], "llama reads at most 16 tokens, fewer than train.length=32"),
        (widen_vocabulary, [], "llama: its vocabulary has 408 tokens, the data's tokenizer 400"),
        (lambda f: None, ["data.tokenizer.vocab_size=420"], "is not the data's"),
        (lambda f: None, ["objective.teacher_weight=0"], "nobody would learn from them"),
        (lambda f: None, ["teachers=[]"], "objective.temperature=2.0 says how students learn from others"),
        (lambda f: None, ["teachers=[]", "objective.temperature=1", "cache.path=x"], "cache without teachers"),
        (lambda f: None, ["cache.path=x", "train.chunks=random"], "it holds fixed chunks"),
        (lambda f: None, ["cache.path=x", "cache.k=400"], "cache.k=400 with a vocabulary of 400 tokens"),
        (lambda f: shutil.copytree(f / "runs/llama/students/one", f / "runs/llama/students/two"), [], "is a run of 2"),
    ],
)
def test_what_cannot_be_a_teacher(
    folder: Path, spoil: Callable[[Path], object], overrides: list[str], expected: str
) -> None:
    spoil(folder)
    assert expected in refusal(distilled(folder, "refused", *overrides))


def cached(folder: Path, name: str, *overrides: str) -> Config:
    return distilled(folder, name, f"cache.path={folder / 'cache'}", "cache.k=16", *overrides)


def test_a_cache_stands_in_for_the_teachers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(teacher_cache, "CHUNKS_PER_PART", 50)
    train(distilled(folder, "live"))
    train(cached(folder, "first", "cache.k=399"))
    assert ", 100% of their mass" in capsys.readouterr().out
    assert losses(folder, "first") == pytest.approx(losses(folder, "live"), rel=1e-4)
    parts = sorted((folder / "cache").glob("part-*.bin"))
    assert len(parts) > 2

    def no_model(*_: Any) -> None:
        raise AssertionError("a whole cache needs no teacher")

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "load_teachers", no_model)
        train(cached(folder, "second", "cache.k=399"))
    assert losses(folder, "second") == losses(folder, "first")

    before = {part: part.read_bytes() for part in parts}
    parts[1].unlink()  # A killed run leaves it so, as parts are whole or missing.
    train(cached(folder, "third", "cache.k=399"))
    assert {part: part.read_bytes() for part in parts} == before


def test_a_cache_of_anything_else_is_refused_by_name(folder: Path) -> None:
    train(cached(folder, "first"))
    for overrides, name in (
        (["cache.k=8"], "its k is 16, this run's 8"),
        (["objective.temperature=1"], "its temperature is 2.0, this run's 1.0"),
        (["objective.mix=each"], "its mix is 'logits', this run's 'each'"),
        (["train.length=16"], "its length is 32, this run's 16"),
        (["teachers.1.weight=2"], "its weights is [1.0, 1.0], this run's [1.0, 2.0]"),
        (["data.seed=5"], "its data is"),
        (["train.precision=bf16"], "its precision is 'fp32'"),
    ):
        assert name in refusal(cached(folder, "other", *overrides))
    path = folder / "runs" / "gpt2" / "students" / "one" / "model.safetensors"
    before = path.read_bytes()
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
    assert "its teachers is" in refusal(cached(folder, "other"))
    path.write_bytes(before)
    part = folder / "cache" / "part-00000.bin"
    whole = part.read_bytes()
    for content in (whole[:-1], whole[:100], b"", whole + b"x"):
        part.write_bytes(content)
        assert f"has {len(content):,} bytes, expected " in refusal(cached(folder, "other"))
    part.write_bytes(whole)
    (folder / "cache" / "manifest.json").write_text("{")
    assert "is damaged: delete" in refusal(cached(folder, "other"))


def test_a_record_comes_back_within_its_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 3, generator=generator), 9 * torch.randn(70_000 // 7, 3, generator=generator)
    k = 5
    top = teacher_cache.top_k(Projected(hidden, weight), k, 2.0)
    log_prob_NV = (hidden @ weight.T / 2).log_softmax(-1)
    torch.testing.assert_close(top.log_prob, log_prob_NV.topk(k).values)
    torch.testing.assert_close(top.log_prob.exp().sum(-1) + top.tail, torch.ones(7))
    streams = [list(top), [top.log_prob - 1e-3, top.index.flip(1), top.tail]]
    unpacked = teacher_cache.unpack(teacher_cache.pack(streams), 2, 7, k)
    for (log_prob, index, tail), (expected, tokens, rest) in zip(unpacked, streams, strict=True):
        assert torch.equal(index, tokens.int())
        assert (log_prob - expected).abs().max() <= 3e-3
        assert (tail / rest - 1).abs().max() <= 3e-3
        torch.testing.assert_close(log_prob.exp().sum(-1) + tail, torch.ones(7))
    assert np.diff(unpacked[0][0].numpy(), axis=1).max() <= 0, "the most probable first"
