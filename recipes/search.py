"""Student search -> a YAML of students that recipes/mutual.py takes, and a plot of the search beside it.

    python recipes/search.py
    python recipes/search.py method=bayesian output=found/students.yaml
    python recipes/search.py method=proxy students=2 family=llama layers=[2,4,6] hidden=[64,128] heads=[4] ffn=256

Settings: recipes/search.yaml; every one there is, with what it means, in engine/search.py.
"""

import signal
import sys
from pathlib import Path

from engine.config import load, user_errors
from engine.search import SearchConfig, search

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and not without ending the trial's run
    with user_errors():
        config = load(SearchConfig, sys.argv[1:], description=__doc__, default=Path(__file__).with_suffix(".yaml"))
        search(config)
        print(Path(config.output).read_text() + config.output)
