"""The scoring recipe as users meet it: a run's students and their ensemble, what it leaves, one line for a mistake."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.settings import StudentConfig, TokenizerConfig
from engine.data import tokenizer as tokenization
from engine.data.grammar.generator import generate, minimal_pairs
from engine.evaluation.score_model import score_model
from engine.models.base import initial_weights
from engine.models.huggingface import export_model
from engine.models.llama import Llama, LlamaShape
from engine.system.errors import UserError

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 360
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")  # others' tests may be in one

specification = importlib.util.spec_from_file_location("score", ROOT / "recipes" / "score.py")
assert specification is not None
assert specification.loader is not None
recipe = importlib.util.module_from_spec(specification)
specification.loader.exec_module(recipe)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Left as it was found: scoring joins a process group of one, whose place it writes there."""
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a run's, with two exported students."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer = tokenization.train(
        generate(0, 3000), TokenizerConfig(), VOCAB_SIZE, folder / "tokenizer", boundary=True
    )
    for seed, name in enumerate(("one", "two")):
        shape = LlamaShape.from_settings(StudentConfig(name, 1, 16, 2, 24, max_length=64), VOCAB_SIZE)
        model = Llama(shape)
        initial_weights(model, shape.layers, seed)
        export_model(folder / "students" / name, shape, dict(model.named_parameters()), tokenizer)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, sets in (("supplement_filtered", 5), ("glue_filtered", 0)):
        (folder / name).mkdir()
        for number in range(sets):
            pairs = minimal_pairs(number, 1)
            lines = [json.dumps({"sentence_good": p.good, "sentence_bad": p.bad}) + "\n" for p in pairs]
            (folder / name / f"set{number}.jsonl").write_text("".join(lines))
    for part in ("train", "valid"):
        example = {"sentence1": "the dog", "sentence2": "a dog", "label": 0}
        lines = [json.dumps(example | {"label": i % 2}) + "\n" for i in range(6)]
        (folder / "glue_filtered" / f"rte.{part}.jsonl").write_text("".join(lines))
    return folder


def score(*arguments: object) -> None:
    score_model(recipe.settings(list(map(str, arguments))))


def test_a_run_is_scored_with_its_ensemble(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("folder=" + str(tmp_path / "scores"), "finetune.epochs=1", "finetune.seeds=[3]")
    score("--model", run, "--tasks", "blimp_supplement,rte", "--data", data, *settings)
    printed = capsys.readouterr().out
    written = {path.name: json.loads((path / "scores.json").read_text()) for path in (tmp_path / "scores").iterdir()}
    assert written.keys() == {"tiny-one", "tiny-two", "tiny-ensemble"}
    assert [task["task"] for task in written["tiny-one"]["tasks"]] == ["blimp_supplement", "rte"]
    assert [task["task"] for task in written["tiny-ensemble"]["tasks"]] == ["blimp_supplement"]
    for name in written:
        assert f"\n{name}\n" in printed
        assert {"scores.csv", "scores.svg"} <= {path.name for path in (tmp_path / "scores" / name).iterdir()}


def test_the_ensemble_of_a_weighted_run_has_its_weights(run: Path, data: Path, tmp_path: Path) -> None:
    weighted = tmp_path / "weighted"
    shutil.copytree(run, weighted)
    (weighted / "students" / "omega.json").write_text(json.dumps({"two": 1.0, "one": 0.0}))
    score("--model", weighted, "--tasks", "blimp_supplement", "--data", data, f"folder={tmp_path / 'scores'}")
    tasks = {
        name: json.loads((tmp_path / "scores" / f"weighted-{name}" / "scores.json").read_text())["tasks"]
        for name in ("one", "two", "ensemble")
    }
    assert tasks["ensemble"] == tasks["two"] != tasks["one"]
    (weighted / "students" / "omega.json").unlink()
    (weighted / "config.yaml").write_text("objective: {weighted: true}")
    with pytest.raises(UserError, match=r"omega.json is missing: recipes/export.py writes it"):
        score("--model", weighted, "--tasks", "blimp_supplement", "--data", data, f"folder={tmp_path / 'scores'}")


def broken(student: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in student.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_mistakes_are_answered_by_one_line_and_nothing_is_written(run: Path, data: Path, tmp_path: Path) -> None:
    student = run / "students" / "one"
    no_tokenizer = broken(student, tmp_path / "no_tokenizer")
    (no_tokenizer / "tokenizer.json").unlink()
    not_finite = broken(student, tmp_path / "not_finite")
    weights = load_file(not_finite / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, not_finite / "model.safetensors")
    not_llama = broken(student, tmp_path / "not_llama")
    config = json.loads((not_llama / "config.json").read_text())
    (not_llama / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))

    not_whole = tmp_path / "not_whole"
    shutil.copytree(run, not_whole)
    (not_whole / "summary.json").write_text(json.dumps({"students": [{"name": n} for n in ("one", "two", "three")]}))

    supplement = ("--data", data, "--tasks", "blimp_supplement")
    for arguments, expected in (
        (("--model", student), "data is missing"),
        (("--model", student, "--data", data, "--tasks", "blimp"), "no blimp_filtered or blimp in"),
        (("--model", student, "--data", data, "--tasks", "blimq"), "'blimq' is not known: expected some of blimp"),
        (("--model", student, *supplement, "taks=[]"), "did you mean 'tasks'"),
        (("--model", tmp_path, *supplement), "expected a Hugging Face folder"),
        (("--model", not_whole, *supplement), "no students/three, and no ensemble without it"),
        (("--model", no_tokenizer, *supplement), "no tokenizer.json"),
        (("--model", not_llama, *supplement), "model_type='mamba': expected "),
        (("--model", not_finite, *supplement), "norm.weight is not finite"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)) as caught:
            score(*arguments, f"folder={tmp_path / 'scores'}")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "scores").exists()


@pytest.mark.slow
def test_two_ranks_fine_tune_as_one_does(run: Path, data: Path, tmp_path: Path) -> None:
    """Six examples in batches of four: of the last batch each rank has one."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    command = [ROOT / "recipes" / "score.py", "--model", run / "students" / "one", "--data", data, "--tasks", "rte"]
    command += ["finetune.batch=4", "finetune.epochs=4", "finetune.learning_rate=1e-2"]
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", 2, "--master_port", port]
    losses = []
    for start in ([sys.executable], launcher):
        folder = tmp_path / str(len(start))
        done = subprocess.run(
            [*map(str, [*start, *command]), f"folder={folder}"],
            env={key: value for key, value in os.environ.items() if key not in GROUP} | {"OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        losses.append([float(x) for x in re.findall(r"epoch \d of 4: loss ([\d.]+)", done.stdout)])
        assert [path.suffix for path in (folder / "one").glob("rte-*")] == [".json"]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1.1e-4), "of numbers with four digits"
