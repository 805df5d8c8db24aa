"""Two students and a tokenizer, in this process."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.config.settings import OptimizerConfig, StudentConfig, TokenizerConfig, TrainConfig
from engine.data import tokenizer as tokenization
from engine.data.grammar.generator import generate
from engine.data.tokenizer import Tokenizer
from engine.models.huggingface import export_model
from engine.students.cohort import Cohort
from engine.students.student import Student, student_model
from engine.system.distributed import Runtime, init_distributed

ROOT = Path(__file__).parents[3]
VOCAB_SIZE = 360
MAX_LENGTH = 48


@pytest.fixture(scope="session")
def runtime() -> Iterator[Runtime]:
    """Joins a process group of one; environment and threads are left as they were."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    runtime = init_distributed()
    torch.set_num_threads(1)
    yield runtime
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cohort(runtime: Runtime) -> Cohort:
    """Two students of different shapes, under ZeRO 0 and 1, whose weights are large enough to have opinions."""
    configs = [
        (TrainConfig(zero_stage=0), StudentConfig("a", 2, 32, 4, 48, kv_heads=2, seed=1, max_length=MAX_LENGTH)),
        (TrainConfig(zero_stage=1), StudentConfig("b", 1, 16, 2, 40, tied=False, seed=2, max_length=MAX_LENGTH)),
    ]
    students = [
        Student(config, student_model(config, VOCAB_SIZE), train, OptimizerConfig(), runtime)
        for train, config in configs
    ]
    with torch.no_grad():
        for student in students:
            for parameter in student.model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(10)
    return Cohort(students, runtime)


@pytest.fixture(scope="session")
def train_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    def train(*, boundary: bool) -> Tokenizer:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        return tokenization.train(generate(0, 3000), TokenizerConfig(), VOCAB_SIZE, folder, boundary=boundary)

    return train


@pytest.fixture(scope="session")
def tokenizer(train_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return train_tokenizer(boundary=True)


@pytest.fixture(scope="session")
def evaluation_data() -> Path:
    """BabyLM's evaluation data; tests that want it are skipped where it is not."""
    path = Path(os.environ.get("CRECHE_EVALUATION", ROOT.parent / "shared" / "data" / "eval"))
    if not path.is_dir():
        pytest.skip("no evaluation data: set CRECHE_EVALUATION to the folder that holds blimp_filtered")
    return path


@pytest.fixture(scope="session")
def exported(cohort: Cohort, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first student as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    export_model(folder, cohort[0].shape, dict(cohort[0].model.named_parameters()), tokenizer)
    return folder
