"""lm-eval, on an exported folder and without any code of ours, ends with our accuracies.

It runs where it is installed: here, or in the environment whose interpreter CRECHE_LM_EVAL names.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.data.grammar.generator import minimal_pairs
from engine.evaluation.log_probabilities import model_log_probabilities
from engine.evaluation.tasks import Question, Task, accuracies
from engine.evaluation.zero_shot import ZeroShot
from engine.models.huggingface import load_model
from engine.system.distributed import Runtime

TEMPLATES = Path(__file__).parent / "lm_eval"
INTERPRETER = os.environ.get("CRECHE_LM_EVAL", sys.executable)
SAMPLE = 40  # of each set
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")  # this process's, in its group


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if subprocess.run([INTERPRETER, "-c", "import lm_eval"], capture_output=True).returncode:
        pytest.skip("lm-eval is not installed: name an interpreter that has it in CRECHE_LM_EVAL")


def sets(folder: Path, data: Path | None) -> Iterator[tuple[str, Path]]:
    """Templates and small files: of the grammar, and a sample of the evaluation data where it is."""
    file = folder / "grammar.jsonl"
    pairs = [{"sentence_good": p.good, "sentence_bad": p.bad} for p in minimal_pairs(7, 5)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    yield "pairs", file
    if data is None:
        return
    names = ["blimp_filtered/passive_1", "blimp_filtered/npi_present_1", "supplement_filtered/turn_taking"]
    others = [("entity_tracking", "entity_tracking/regular"), ("wug", "wug_adj_nominalization/wug_adj_nominalization")]
    for template, name in [*(("pairs", name) for name in names), *others]:
        lines = (data / f"{name}.jsonl").read_text().splitlines(keepends=True)
        file = folder / Path(name).name
        file.with_suffix(".jsonl").write_text("".join(lines[:: len(lines) // SAMPLE]))
        yield template, file.with_suffix(".jsonl")


def lm_eval(student: Path, tasks: list[tuple[str, Path]], folder: Path) -> dict[str, float]:
    for template, file in tasks:
        include = str(TEMPLATES / f"{template}.yaml")
        task = {"include": include, "task": file.stem, "dataset_kwargs": {"data_files": str(file)}}
        (folder / f"{file.stem}.yaml").write_text(json.dumps(task))  # JSON is YAML
    names = ",".join(file.stem for _, file in tasks)
    command = [INTERPRETER, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={student},dtype=float32"]
    command += ["--tasks", names, "--include_path", str(folder), "--device", "cpu", "--batch_size", "16"]
    alone = {key: value for key, value in os.environ.items() if key not in GROUP}
    environment = alone | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [*command, "--log_samples", "--output_path", str(folder / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (folder / "out").rglob("results_*.json")
    return {name: scores["acc,none"] for name, scores in json.loads(results.read_text())["results"].items()}


@pytest.mark.slow
def test_the_accuracies_of_lm_eval_are_ours(
    exported: Path, runtime: Runtime, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    try:
        data = request.getfixturevalue("evaluation_data")
    except pytest.skip.Exception:
        data = None
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 700}))
    try:
        tasks = list(sets(tmp_path, data))
        theirs = lm_eval(exported, tasks, tmp_path)
        model, tokenizer = load_model(exported)
    finally:
        (exported / "config.json").write_text(json.dumps(config))
    for template, file in tasks:
        task = Task(file.stem, list(questions_of(template, file)), accuracies)
        zero_shot = ZeroShot([task], tokenizer, runtime, max_length=700, share=True)
        with torch.inference_mode():
            [answers] = zero_shot.answers(model_log_probabilities([model]))
        assert sum(item[0] == max(item) for item in answers) / len(answers) == pytest.approx(theirs[file.stem])
        assert 0 < theirs[file.stem] < 1


def questions_of(template: str, file: Path) -> Iterator[Question]:
    for item in map(json.loads, file.read_text().split("\n")[:-1]):
        if template == "pairs":
            yield Question("", (item["sentence_good"], item["sentence_bad"]))
        elif template == "entity_tracking":
            yield Question("", tuple(item["input_prefix"] + option for option in item["options"]))
        else:
            yield Question("", tuple(item["sentences"].split("\t")))
