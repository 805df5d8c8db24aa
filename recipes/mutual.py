"""Several students learn together, online, each from the text and from the others (deep mutual learning).

    deepspeed recipes/mutual.py
    deepspeed --num_accelerators 2 recipes/mutual.py data.path=my_texts train.steps=2000 students.0.layers=8
    python recipes/mutual.py --dry-run

Settings: recipes/mutual.yaml; every one there is, with what it means, in engine/config.py.
"""

from engine.command import run_recipe

if __name__ == "__main__":
    run_recipe(__file__, __doc__)
