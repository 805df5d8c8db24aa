"""A search for the students that learn together: writes a YAML file for recipes/mutual.py, and a plot beside it.

    python recipes/search.py
    python recipes/search.py method=bayesian output=found/students.yaml

Settings: recipes/search.yaml; `--settings` prints every one, with its default and meaning.
"""

import sys
from pathlib import Path

from engine.cli import load
from engine.config.settings import SearchConfig
from engine.system.errors import report_errors

if __name__ == "__main__":
    with report_errors():
        config = load(SearchConfig, sys.argv[1:], description=__doc__, default=Path(__file__).with_suffix(".yaml"))
        from engine.search.students import search  # It imports torch, which takes seconds: mistakes are shown before.

        search(config)
        print(Path(config.output).read_text(encoding="utf-8") + config.output)
