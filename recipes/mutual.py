"""Several students learn together, online, each from the text and from the others (deep mutual learning).

    deepspeed recipes/mutual.py
    deepspeed --num_accelerators 2 recipes/mutual.py data.path=my_texts train.steps=2000 students.0.layers=8
    python recipes/mutual.py --dry-run

Settings: recipes/mutual.yaml; `--settings` prints every one, with its default and meaning.
"""

from engine.cli import run_recipe

if __name__ == "__main__":
    run_recipe(__file__, __doc__)
