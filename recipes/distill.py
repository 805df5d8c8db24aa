"""Students learn from frozen teachers, and from the text: Baby Llama, BabyLlama-2, and what lies between.

    deepspeed recipes/distill.py teachers.0.path=runs/teacher-gpt2 teachers.1.path=runs/teacher-llama
    deepspeed recipes/distill.py --config recipes/baby_llama/student-58m.yaml data.path=babylm_10M
    deepspeed recipes/distill.py teachers.context=stream cache.path=cache
    python recipes/distill.py --config recipes/baby_llama_2/student.yaml --dry-run

A teacher is a Hugging Face folder of a known family, or the folder of a run; its tokenizer must be the data's. With
`cache.path` its hidden states are computed once and read from then on: with `teachers.context=stream` from windows of
its own, and otherwise with `train.chunks=fixed`.

Settings: recipes/distill.yaml; `--settings` prints every one, with its default and meaning.
"""

from engine.cli import run_recipe
from engine.config.settings import Config
from engine.system.errors import UserError


def has_teachers(config: Config) -> None:
    if not config.teachers:
        raise UserError("no teachers: name at least one, such as teachers.0.path=runs/teacher-gpt2")


if __name__ == "__main__":
    run_recipe(__file__, __doc__, has_teachers)
