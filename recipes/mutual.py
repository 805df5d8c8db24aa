"""Several students learn together, online, each from the text and from the others (deep mutual learning).

    deepspeed recipes/mutual.py
    deepspeed --num_accelerators 2 recipes/mutual.py data.path=my_texts train.steps=2000 students.0.layers=8

Settings: recipes/mutual.yaml; every one there is, with what it means, in engine/config.py.
"""

import sys
from pathlib import Path

from engine.config import Config, load, user_errors

if __name__ == "__main__":
    with user_errors():
        config = load(Config, sys.argv[1:], description=__doc__, default=Path(__file__).with_suffix(".yaml"))
        from engine.train import train  # after the settings are known to be right: it imports torch and deepspeed

        train(config)
