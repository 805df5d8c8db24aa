"""The command line of every recipe that trains: settings, `--dry-run`, and what a recipe may hold and need."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import Config, argument_parser, build, read_yaml, user_errors


def run_recipe(script: str, description: str | None, require: Callable[[Config], None] = lambda config: None) -> None:
    """Train as the command line says; `require` raises ValueError where the settings are not this recipe's."""
    with user_errors():
        parser = argument_parser(description, Path(script).with_suffix(".yaml"))
        parser.add_argument("--dry-run", action="store_true", help="print what the run would take, and end")
        arguments = parser.parse_intermixed_args(sys.argv[1:])
        config = build(Config, read_yaml(arguments.config), arguments.overrides)
        require(config)
        if arguments.dry_run:
            from engine.dry_run import report

            print(report(config, arguments.config.parent))
            return
        from engine.runtime import end  # after the settings are known to be right: torch and deepspeed take a while
        from engine.train import train

        train(config)
        end()


def library(name: str) -> Any:
    """A module of the extra `search`, which not everyone needs; ValueError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"no {name} here: install it with `pip install 'creche[search]'`") from None
