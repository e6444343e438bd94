# `make test` and `make quickstart` each start from a bare checkout: python3 (3.11 or newer), a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ubgen-installed
NATIVE := CMakeLists.txt $(wildcard kernels/include/ubgen/*.h kernels/src/* kernels/tests/*)

MAKEFLAGS += --no-print-directory

.PHONY: test slow quickstart reproduce install lint format kernels sanitize clean

# One process per core, each with one thread: small networks gain little from a second thread. Slow folders come first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadscope --no-loadscope-reorder

test: lint kernels sanitize
	$(PYTEST) -m "not gpu and not slow"

slow: install
	$(PYTEST) -m "slow and not gpu"

quickstart: install
	$(BIN)/python -m ubgen.cli.quickstart

# Tables 1, 3 and 4 of the paper in miniature: hours, or with SIZE=small every path in minutes. Run again, it continues.
SIZE := whole
reproduce: install
	$(BIN)/python bench/reproduce/run.py --size $(SIZE)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The C++ tests are run again when something that they depend on has changed. Where there is no C++ compiler, nothing is
# built and no test is found: not a failure. The CUDA library is built by the installation.
kernels: build/kernels.passed

build/kernels.passed: $(STAMP) $(NATIVE)
	mkdir -p build
	$(BIN)/cmake -S . -B build/kernels -DUBGEN_CUDA=OFF > build/kernels.log || (cat build/kernels.log; false)
	$(BIN)/cmake --build build/kernels --parallel 2
	$(BIN)/ctest --test-dir build/kernels --output-on-failure --parallel 2
	touch $@

# The same C++ tests under the address and undefined-behaviour sanitizers: the CPU code, and the CUDA source run on the CPU.
# Without a compiler that has the sanitizers, one line says so and nothing fails.
sanitize: build/sanitize.passed

build/sanitize.passed: $(STAMP) $(NATIVE)
	mkdir -p build
	$(BIN)/cmake -S . -B build/sanitize -DUBGEN_SANITIZE=ON -DUBGEN_CUDA=OFF > build/sanitize.log || (cat build/sanitize.log; false)
	@grep -o "No C++ compiler.*\|No sanitizers.*" build/sanitize.log || true
	$(BIN)/cmake --build build/sanitize --parallel 2
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --parallel 2
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
