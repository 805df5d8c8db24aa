"""Runs that learn from frozen teachers, and the refusal of what cannot be a teacher."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.batches import Batch
from engine.models.huggingface import shape_of_folder
from engine.models.llama import Llama, LlamaShape
from engine.run.run import Run
from engine.system.errors import UserError
from engine.teachers.teachers import Teacher, Teachers, folder_of, stream_window
from engine.train import train
from kernels import Projected
from tests.engine.teachers.tiny_teachers import BOTH, VOCAB_SIZE, distilled, losses, refusal, steps


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
    (mean,) = Teachers(["mean"], [1.0], [Teacher(model) for model in models], (0.25, 0.75))(batch)
    assert isinstance(mean, Projected)
    torch.testing.assert_close(mean.hidden @ mean.weight.T, expected_NV)
    storages = {model.head.untyped_storage().data_ptr() for model in models}
    assert storages == {mean.weight.untyped_storage().data_ptr()}


def test_the_papers_reduction_counts_the_last_position_too(folder: Path) -> None:
    train(distilled(folder, "paper", "objective.reduction=sequence", "objective.kl_everywhere=true"))
    for number, step in enumerate(steps(folder, "paper"), 1):
        assert step["tokens"] == number * 4 * 15, "of 16 positions one has no target"
        student, (_, kl) = step["students"]["one"], step["kl"][0]
        assert student["loss"] == pytest.approx(0.5 * student["ce"] + 4 * 15 * kl, rel=1e-5)


def test_teachers_are_frozen_and_whole_beside_zero_3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    finish = Run.finish
    monkeypatch.setattr(Run, "finish", lambda self: (seen.append(self.teachers), finish(self)))
    train(distilled(folder, "sharded", "train.zero_stage=3"))
    train(distilled(folder, "whole", "train.zero_stage=0"))
    assert losses(folder, "sharded") == pytest.approx(losses(folder, "whole"), rel=1e-6)
    for name, teacher in zip(BOTH, seen[0].teachers, strict=True):
        model = teacher.model
        stored = load_file(folder / "runs" / name / "students" / "one" / "model.safetensors")
        assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in stored.values())
        assert not model.training
        for parameter in model.parameters():
            assert not parameter.requires_grad
            assert not hasattr(parameter, "ds_id"), "DeepSpeed has its hands on it"


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
        (spoil_config(max_position_embeddings=8), [], "llama reads at most 8 tokens, fewer than train.length=16"),
        (widen_vocabulary, [], "llama: its vocabulary has 408 tokens, the data's tokenizer 400"),
        (lambda f: None, ["data.tokenizer.vocab_size=420"], "is not the data's"),
        (lambda f: None, ["objective.teacher_weight=0"], "nobody would learn from them"),
        (lambda f: None, ["teachers=[]"], "objective.temperature=2.0 says how students learn from others"),
        (lambda f: shutil.copytree(f / "runs/llama/students/one", f / "runs/llama/students/two"), [], "is a run of 2"),
    ],
)
def test_what_cannot_be_a_teacher(
    folder: Path, spoil: Callable[[Path], object], overrides: list[str], expected: str
) -> None:
    spoil(folder)
    assert expected in refusal(distilled(folder, "refused", *overrides))
    assert not (folder / "runs" / "refused").exists(), "before anything is written"


def test_a_window_is_no_longer_than_a_teachers_training(models: Path, folder: Path) -> None:
    """Its run says how long its sequences were; of a folder without its run only the longest position is known."""
    shutil.copy(models / "runs" / "llama" / "config.yaml", folder / "runs" / "llama")
    copy = folder / "copied"
    shutil.copytree(folder / "runs" / "llama" / "students" / "one", copy)
    for path, length, expected in (
        (folder / "runs" / "llama", 16, 16),
        (folder / "runs" / "llama" / "students" / "one", 16, 16),
        (folder / "runs" / "llama", 5, 10),
        (copy, 16, 32),
        (copy, 31, 32),
    ):
        config = distilled(folder, "windows", f"teachers.0.path={path}", f"train.length={length}")
        shape = shape_of_folder(folder_of(config.teachers[0]), "llama")
        assert stream_window(config, config.teachers[0], shape) == expected
        wider = replace(config.teachers[0], window=24)
        assert stream_window(config, wider, shape) == 24
