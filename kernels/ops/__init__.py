"""Each op has a folder: `__init__.py` is its public function, `reference.py` its definition, the rest its backends."""
