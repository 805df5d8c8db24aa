"""One model learns from the text alone, by cross-entropy: a teacher to be, or the control of a distilled student.

    deepspeed recipes/pretrain.py
    deepspeed recipes/pretrain.py --config recipes/baby_llama/gpt2-705m-original.yaml data.path=babylm_10M
    python recipes/pretrain.py --config recipes/baby_llama_2/teacher-1.yaml --dry-run

Settings: recipes/pretrain.yaml; `--settings` prints every one, with its default and meaning.
"""

from engine.cli import run_recipe
from engine.config.settings import Config
from engine.system.errors import UserError


def one_model_alone(config: Config) -> None:
    if len(config.students) != 1 or config.teachers:
        raise UserError(
            f"{len(config.students)} students and {len(config.teachers)} teachers: this recipe trains one model alone; "
            "take recipes/mutual.py or recipes/distill.py"
        )


if __name__ == "__main__":
    run_recipe(__file__, __doc__, one_model_alone)
