"""Scores on BabyLM's evaluation data: of a run's students and their ensemble, or of any Hugging Face folder of a known
family.

    python recipes/score.py --model runs/mutual --data evaluation_data
    python recipes/score.py --model runs/mutual/students/deep --tasks blimp,blimp_supplement --data evaluation_data
    deepspeed recipes/score.py --model my_llama --tasks mnli,rte --data evaluation_data finetune.seeds=[1,2,3]

Settings: recipes/score.yaml; `--settings` prints every one, with its default and meaning.
"""

import sys
from pathlib import Path

from engine.cli import argument_parser
from engine.config.loading import build, read_yaml
from engine.config.settings import ScoreConfig
from engine.system.errors import report_errors


def settings(argv: list[str]) -> ScoreConfig:
    parser = argument_parser(ScoreConfig, __doc__, Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--model", help="a run's folder, or a Hugging Face folder")
    parser.add_argument("--tasks", help="names with commas between")
    parser.add_argument("--data", help="the folder of the evaluation data")
    arguments = parser.parse_intermixed_args(argv)
    given = {key: getattr(arguments, key) for key in ("model", "data") if getattr(arguments, key) is not None}
    if arguments.tasks is not None:
        given["tasks"] = arguments.tasks.split(",")
    return build(ScoreConfig, read_yaml(arguments.config) | given, arguments.overrides)


if __name__ == "__main__":
    with report_errors():
        config = settings(sys.argv[1:])
        from engine.evaluation.scores import score_model  # after the settings are known to be right: they import torch
        from engine.system.distributed import exit_process

        score_model(config)
        exit_process()
