# Each target sets itself up on a fresh machine that has Python 3.11, 3.12 or 3.13 with headers and venv, g++ and make.

# The newest Python that runs and has its headers; `make PYTHON=...` takes another.
HAS_HEADERS = import os, sysconfig, venv; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11,$(shell $(name) -c '$(HAS_HEADERS)' 2>/dev/null && echo $(name))) python3.11)
BIN := .venv/bin
DATA ?= grammar
RUN = $(if $(filter grammar,$(DATA)),mutual,mutual-$(notdir $(subst :,-,$(DATA:/=))))

.PHONY: mutual test lint bench gpu sanitize clean

mutual: .venv/installed
	$(BIN)/deepspeed --log_level error recipes/mutual.py data.path=$(DATA) run.name=$(RUN)

# Triton's interpreter is chosen for a whole process, before its kernels are imported: hence the second one.
test: .venv/tested
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels/ops/triton tests/engine/models/test_compiled.py tests/benchmarks/test_traffic.py tests/benchmarks/test_liger.py

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/tested
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/throughput.py

gpu: .venv/tested
	$(BIN)/python benchmarks/gpu.py

# The native kernels' tests once more, on a build that stops at any bad address or undefined operation.
SANITIZERS = $(shell g++ -print-file-name=libasan.so):$(shell g++ -print-file-name=libubsan.so)
sanitize: .venv/tested
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DSANITIZE=ON "-DINSTRUCTION_SETS=default;avx2;avx512" -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/sanitize
	KERNELS_NATIVE=$(abspath build/sanitize) LD_PRELOAD=$(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest -s -p no:cacheprovider tests/kernels/test_native.py tests/kernels/ops -k 'native or tiles'

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
