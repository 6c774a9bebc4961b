# Every target makes .venv first, where it is missing. `make demo` and `make test` need nothing else prepared.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo

.PHONY: demo test test-all lint sanitize types bench clean

# torch first and pinned: an open range would fetch another build.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py $(DEMO)

test: $(READY) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not network'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

SANITIZED := $(CURDIR)/build/kernels-sanitized.so
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer

# The kernels in C, with bounds and undefined behaviour watched.
sanitize: $(READY)
	$(BIN)/python -c "from svdit.kernels.cpu.build import *; compile_library(Path('$(SANITIZED)'), '-O1 -g $(SANITIZE)'.split())"
	LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	SVDIT_KERNELS=$(SANITIZED) OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/kernels/test_cpu.py

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
