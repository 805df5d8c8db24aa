"""One folder per op: `__init__.py` is the public function, `reference.py` the definition, other backends beside it."""
