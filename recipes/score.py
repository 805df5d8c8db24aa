"""Scores a run's students and their ensemble, or a Hugging Face folder of a known family, on BabyLM's evaluation data.

    python recipes/score.py --model runs/mutual --data evaluation_data
    python recipes/score.py --model runs/mutual/students/deep --tasks blimp,blimp_supplement --data evaluation_data
    deepspeed recipes/score.py --model my_llama --tasks mnli,rte --data evaluation_data finetune.seeds=[1,2,3]

The settings are in recipes/score.yaml; `--settings` prints every one, with its default and meaning.
"""

import sys
from pathlib import Path

from engine.cli import argument_parser
from engine.config.loading import build, read_yaml
from engine.config.settings import ScoreConfig
from engine.system.errors import report_errors


def settings(argv: list[str]) -> ScoreConfig:
    parser = argument_parser(ScoreConfig, __doc__, Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--model", help="folder of a run, or a Hugging Face folder")
    parser.add_argument("--data", help="folder of the evaluation data")
    parser.add_argument("--tasks", type=lambda names: names.split(","), help="names of tasks, separated by commas")
    arguments = parser.parse_intermixed_args(argv)
    options = {key: getattr(arguments, key) for key in ("model", "data", "tasks")}
    given = {key: value for key, value in options.items() if value is not None}
    return build(ScoreConfig, read_yaml(arguments.config) | given, arguments.overrides)


if __name__ == "__main__":
    with report_errors():
        config = settings(sys.argv[1:])
        # These imports bring torch, which takes seconds: a mistake in the settings is reported before.
        from engine.evaluation.score_model import score_model
        from engine.system.distributed import exit_process

        score_model(config)
        exit_process()
