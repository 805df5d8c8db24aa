# Each target sets itself up on a fresh machine that has Python 3.11 with headers and venv, g++ and make.

PYTHON ?= python3.11
BIN := .venv/bin
DATA ?= grammar
RUN = $(if $(filter grammar,$(DATA)),mutual,mutual-$(notdir $(subst :,-,$(DATA:/=))))

.PHONY: mutual test lint clean

mutual: .venv/installed
	$(BIN)/deepspeed --log_level error recipes/mutual.py data.path=$(DATA) run.name=$(RUN)

test: .venv/tested
	$(BIN)/python -m pytest

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# torch first and by its exact version: whatever pip resolves next finds it there and fetches no other.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'scikit-build-core>=0.11' 'cmake>=3.26' ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[dev]'
	touch $@
