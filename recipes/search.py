"""Student search -> a YAML of students that recipes/mutual.py takes, and a plot of the search beside it.

    python recipes/search.py
    python recipes/search.py method=bayesian output=found/students.yaml

Settings: recipes/search.yaml; `--settings` prints every one, with its default and meaning.
"""

import sys
from pathlib import Path

from engine.cli import load
from engine.config.settings import SearchConfig
from engine.search.students import search
from engine.system.errors import report_errors

if __name__ == "__main__":
    with report_errors():
        config = load(SearchConfig, sys.argv[1:], description=__doc__, default=Path(__file__).with_suffix(".yaml"))
        search(config)
        print(Path(config.output).read_text() + config.output)
