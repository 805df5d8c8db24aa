"""The command line of the recipes: `--config`, `key=value` overrides, `--settings`, `--dry-run`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from engine.config.describe import describe
from engine.config.loading import build, read_yaml
from engine.config.settings import Config
from engine.system.errors import report_errors

C = TypeVar("C")


def run_recipe(script: str, description: str | None, require: Callable[[Config], None] = lambda config: None) -> None:
    """Trains as the command line says. The YAML file beside `script` has the recipe's settings.

    `require` raises UserError where the settings are not this recipe's.
    """
    with report_errors():
        parser = argument_parser(Config, description, Path(script).with_suffix(".yaml"))
        parser.add_argument("--dry-run", action="store_true", help="print what the run would take, and end")
        arguments = parser.parse_intermixed_args(sys.argv[1:])
        config = build(Config, read_yaml(arguments.config), arguments.overrides)
        require(config)
        if arguments.dry_run:
            from engine.run.dry_run import describe_run

            print(describe_run(config, arguments.config.parent))
            return
        # Importing torch and deepspeed takes seconds: mistakes in the settings are shown before.
        from engine.system.distributed import exit_process
        from engine.train import train

        train(config)
        exit_process()


def load(cls: type[C], argv: Sequence[str], *, description: str | None, default: Path) -> C:
    """Returns the settings that a command line asks for; UserError for what does not fit."""
    # Options may stand between overrides.
    arguments = argument_parser(cls, description, default).parse_intermixed_args(argv)
    return build(cls, read_yaml(arguments.config), arguments.overrides)


def argument_parser(cls: type, description: str | None, default: Path) -> argparse.ArgumentParser:
    """Returns the parser that every recipe has: `--settings` prints `cls`, and `default` is read without `--config`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    class PrintSettings(argparse.Action):
        def __call__(self, *_: object) -> None:
            print(describe(cls), end="")
            parser.exit()

    parser.add_argument("--config", type=Path, default=default, help=f"YAML file of settings (default: {default.name})")
    parser.add_argument(
        "--settings", action=PrintSettings, nargs=0, help="print every setting, its default and meaning"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # The launcher passes it.
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=1000 students.0.layers=8")
    return parser
