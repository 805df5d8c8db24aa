import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.cli import load
from engine.config.loading import as_dict, build, read_yaml, save
from engine.config.settings import Config, PrepareConfig
from engine.system.errors import UserError

ROOT = Path(__file__).parents[3]
STUDENT = {"name": "a", "layers": 2, "hidden": 32, "heads": 4, "ffn": 48}


def config(*overrides: str, **settings: Any) -> Config:
    return build(Config, {"students": [dict(STUDENT), {**STUDENT, "name": "b"}], **settings}, overrides)


def test_overrides_reach_nested_keys_and_list_places_over_the_yaml_over_the_defaults() -> None:
    settings = config(
        "train.steps=7",
        "data.tokenizer.vocab_size=300",
        "students.1.layers=8",
        "students.0.learning_rate=1e-3",  # to YAML 1.1 that is text
        "train.micro_batch=null",
        "optimizer.betas=[0.8, 0.99]",
        "data.boundary=false",
        "data.path=a=b",
        train={"steps": 5, "batch": 6, "micro_batch": 2},
        optimizer={"betas": [0.9, 0.98]},
    )
    assert (settings.train.steps, settings.train.batch, settings.train.micro_batch, settings.train.length) == (
        7,
        6,
        None,
        128,
    )
    assert settings.data.tokenizer.vocab_size == 300
    assert [s.layers for s in settings.students] == [2, 8]
    assert settings.students[0].learning_rate == 1e-3
    assert settings.optimizer.betas == (0.8, 0.99)
    assert settings.data.boundary is False
    assert settings.data.path == "a=b"
    taught = config("teachers.0.path=a", "teachers.1.path=b", "teachers.1.weight=2", "evaluation.tasks.0=blimp")
    assert [(teacher.path, teacher.weight) for teacher in taught.teachers] == [("a", 1.0), ("b", 2.0)]
    assert taught.evaluation.tasks == ("blimp",)
    assert config("optimizer.betas.1=0.5", optimizer={"betas": [0.9, 0.98]}).optimizer.betas == (0.9, 0.5)


def test_a_name_behind_a_list_sets_the_value_in_each_item() -> None:
    settings = config("students.layers=8", "students.1.layers=3", "students.learning_rate=1e-3")
    assert [student.layers for student in settings.students] == [8, 3]
    assert [student.learning_rate for student in settings.students] == [1e-3, 1e-3]
    assert [student.layers for student in config("students.1.layers=3", "students.layers=8").students] == [8, 8]
    taught = config("teachers=[{path: a}, {path: b, weight: 2}]", "teachers.context=stream", "teachers.1.window=8")
    assert [(t.path, t.context, t.window, t.weight) for t in taught.teachers] == [
        ("a", "stream", None, 1.0),
        ("b", "stream", 8, 2.0),
    ]
    for override in ("evaluation.tasks.context=x", "optimizer.betas.first=x", "teachers.context=stream"):
        with pytest.raises(UserError, match=override.partition("=")[0]):
            config(override, teachers=[], evaluation={"tasks": ["blimp"]}, optimizer={"betas": [0.9, 0.98]})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=4", "unknown key 'trian': did you mean 'train'?"),
        ("data.tokenizer.vocab_sise=4", "unknown key 'data.tokenizer.vocab_sise': did you mean 'vocab_size'?"),
        ("students.1.lerning_rate=4", "unknown key 'students.1.lerning_rate': did you mean 'learning_rate'?"),
        ("run.zzz=4", "unknown key 'run.zzz': expected one of name, folder, resume, log_every"),
        ("train.steps=many", "train.steps='many': input should be a valid integer"),
        ("train.steps=1.5", "train.steps=1.5: input should be a valid integer"),
        ("train.steps=0", "train.steps=0: input should be greater than or equal to 1"),
        ("train.steps=", "train.steps=None: input should be a valid integer"),
        ("train.length=1", "train.length=1: input should be greater than or equal to 2"),
        ("train.zero_stage=4", "train.zero_stage=4: input should be 'auto', 0, 1, 2 or 3"),
        ("optimizer.schedule=cosinus", "optimizer.schedule='cosinus': input should be 'cosine'"),
        ("optimizer.clip=.nan", "optimizer.clip=nan: input should be a finite number"),
        ("optimizer.clip=.inf", "optimizer.clip=inf: input should be a finite number"),
        ("optimizer.min_lr_ratio=.nan", "optimizer.min_lr_ratio=nan: "),
        ("optimizer.min_lr_ratio=1.5", "optimizer.min_lr_ratio=1.5: input should be less than or equal to 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing"),
        ("data.validation=1", "data.validation=1: input should be less than 1"),
        ("objective.temperature=0", "objective.temperature=0: input should be greater than 0"),
        ("students.0.name=../x", "students.0.name='../x': string should match"),
        ("run.name=2024", "run.name=2024: input should be a valid string"),
        ("students.0.preset=gpt-5", "preset 'gpt-5' is not known: expected one of baby-llama-58m"),
        ("students.2.layers=4", "students.2.name is missing: set it in the YAML file, or as students.2.name=value"),
        (
            "students.3.layers=4",
            "students.3.layers: '3' is not an index of a list of 2: expected 0 to 2 (2 appends an item)",
        ),
        (
            "students.-1.layers=4",
            "students.-1.layers: '-1' is not an index of a list of 2: expected 0 to 2 (2 appends an item)",
        ),
        ("students.a.layers=4", "unknown key 'students.0.a': expected one of name, layers, "),
        ("students.layrs=4", "unknown key 'students.0.layrs': did you mean 'layers'?"),
        ("students.layers=deep", "students.0.layers='deep': input should be a valid integer"),
        ("cache.pathh=4", "unknown key 'cache.pathh': did you mean 'path'?"),
        ("train.steps", "'train.steps': expected key=value"),
        ("=4", "'=4': expected key=value"),
        ("train.steps=[", "'train.steps=[': the value is not YAML"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_key_within_a_null_begins_what_the_null_left_out() -> None:
    settings = build(Config, {"students": [dict(STUDENT)], "cache": None}, ["cache.path=states"])
    assert settings.cache is not None
    assert settings.cache.path == "states"


@pytest.mark.parametrize("override", ["train.steps=true", "objective.peer_weight=on", "students.0.learning_rate=yes"])
def test_a_truth_value_is_no_number(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        config(override)


def test_a_misspelt_required_key_is_named_rather_than_the_one_it_leaves_out() -> None:
    misspelt = {"layrs" if key == "layers" else key: value for key, value in STUDENT.items()}
    with pytest.raises(UserError, match=r"unknown key 'students\.0\.layrs': did you mean 'layers'\?"):
        build(Config, {"students": [misspelt]})
    with pytest.raises(UserError, match=r"students\.0\.layers is missing"):
        build(Config, {"students": [{k: v for k, v in STUDENT.items() if k != "layers"}]})


@pytest.mark.parametrize("override", ["students.0.layers=8", "students.0.preset=[x]"])
def test_students_that_are_no_mappings_end_in_a_users_error(override: str) -> None:
    students = ["deep"] if "layers" in override else [dict(STUDENT)]
    with pytest.raises(UserError, match=r"students\.0|preset"):
        build(Config, {"students": students}, [override])


def test_a_preset_gives_the_shape_and_what_the_student_says_goes_over_it() -> None:
    settings = build(
        Config,
        {"students": [{"name": "a", "preset": "baby-llama-58m"}, {"name": "b", "preset": "smol-llama-345m"}]},
        ["students.1.layers=4", "students.0.tied=true"],
    )
    a, b = settings.students
    assert (a.layers, a.hidden, a.heads, a.kv_heads, a.ffn, a.tied, a.max_length) == (16, 512, 8, None, 1024, True, 256)
    assert (b.layers, b.hidden, b.heads, b.kv_heads, b.ffn, b.tied, b.max_length) == (4, 960, 15, 5, 2560, False, 256)


def test_resolved_settings_come_back_equal_from_dictionaries_and_from_the_file(tmp_path: Path) -> None:
    before = build(
        Config,
        {"students": [{"name": "a", "preset": "smol-llama-345m", "learning_rate": 7e-5}, dict(STUDENT)]},
        ["optimizer.eps=1e-9", "data.path='Märchen: eins'", "train.micro_batch=4", "run.name=007a"],
    )
    assert build(Config, as_dict(before)) == before
    path = tmp_path / "config.yaml"
    save(before, path, git_commit="abc+changes")
    assert path.read_text(encoding="utf-8").startswith("# git_commit: abc+changes\n")
    assert read_yaml(path) == as_dict(before)
    assert build(Config, read_yaml(path)) == before


def test_the_command_line_takes_a_file_overrides_and_the_launchers_local_rank(tmp_path: Path) -> None:
    default, other = tmp_path / "default.yaml", tmp_path / "other.yaml"
    default.write_text("data: {path: here}")
    other.write_text("data: {path: there, words: 5}")

    def loaded(*argv: str) -> tuple[str, int | None]:
        data = load(PrepareConfig, argv, description=None, default=default).data
        return data.path, data.words

    assert loaded() == ("here", None)
    assert loaded("--local_rank=0", "data.words=3") == ("here", 3)
    assert loaded("--local_rank=1", "--config", str(other)) == ("there", 5)
    assert loaded("--config", str(other), "data.words=3", "data.path=x") == ("x", 3)
    assert loaded("data.words=3", "--config", str(other)) == ("there", 3)
    assert loaded("data.words=3", "--config", str(other), "data.path=x") == ("x", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; name a YAML file"),
        ("[1]", "expected a mapping of settings, such as .*, found list"),
        ("a: [", "not YAML"),
    ],
)
def test_a_settings_file_that_is_none_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_refuses_an_unknown_key_before_it_writes_anything(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, ROOT / "recipes" / "mutual.py", "--local_rank=0", "train.stepz=3"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert finished.stderr == "error: unknown key 'train.stepz': did you mean 'steps'?\n"
    assert finished.stdout == ""
    assert list(tmp_path.iterdir()) == []
