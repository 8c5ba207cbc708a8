# Development targets. `make demo` and `make test` make .venv first when it is missing; PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEPENDENCIES := $(VENV)/.dependencies
NATIVE := $(VENV)/.native
TORCH := $(shell sed -n 's/^requires = .*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
BUILD_REQUIREMENTS := 'setuptools>=77.0.3' pybind11 ninja wheel numpy
BUILD := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
SOURCES := setup.py tools/cuda_build.py $(shell find csrc -type f)

.PHONY: demo test test-simt test-second test-full cuda bench lint format clean

demo: $(NATIVE)
	$(BIN)/python -m pytrain demo

test: $(NATIVE)
	$(BIN)/python -m pytest -n 2 -m "not slow and not matrix"

# The suites of what steps on a device, over the CUDA kernels' own source, compiled for the CPU.
SIMT := oracle storage step steps step_averages scaler format_checkpoints histories numbers properties release ops
SUITES := $(SIMT:%=tests/optim/test_%.py) tests/test_amp.py tests/test_amp_steps.py tests/test_ema.py tests/test_multi.py
test-simt: $(NATIVE)
	$(BIN)/python tests/simt/build.py
	PYTRAIN_BACKEND=simt $(BIN)/python -m pytest -n 2 -m "not slow and not matrix" $(SUITES)
	PYTRAIN_BACKEND=simt $(BIN)/python tools/make_docs.py --check

# The same suites where tensors count as being on a second device: what CUDA refuses is refused (tests/devices.py).
test-second: $(NATIVE)
	$(BIN)/python tests/simt/build.py
	PYTRAIN_TEST_DEVICE=second PYTRAIN_BACKEND=simt PYTRAIN_SIMT_REMOTE=1 $(BIN)/python -m pytest -n 2 \
	  -m "not slow and not matrix" $(SUITES)

test-full: $(NATIVE) test-simt test-second
	$(BIN)/python -m pytest -n 2
	$(BIN)/python tools/check_codegen.py
	$(BIN)/python tools/mutate_rules.py
	$(BIN)/python tests/simt/check.py --all
	$(BIN)/python tools/mutate_cuda.py
	$(BIN)/python tools/sass_gate.py --all
	$(BIN)/python tools/build_matrix.py --all

# The CUDA kernels too, in place; TORCH_CUDA_ARCH_LIST picks the architectures.
cuda: $(DEPENDENCIES)
	PYTRAIN_CUDA=1 $(BUILD)
	touch $(NATIVE)

bench: $(NATIVE)
	$(BIN)/python benchmarks/bench_optim.py

lint: $(NATIVE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(NATIVE)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info pytrain/*.so pytrain/_*_reason.txt
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache

.venv: $(NATIVE)

$(DEPENDENCIES): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) $(BUILD_REQUIREMENTS)
	PYTRAIN_NO_NATIVE=1 $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,demo,export,dev]'
	touch $@

# Without nvcc, which takes minutes.
$(NATIVE): $(DEPENDENCIES) $(SOURCES)
	PYTRAIN_CUDA=0 $(BUILD)
	touch $@

# On a CUDA device where there is one, with the suites of the CPU's kernels too; else tests/gpu on the CPU, simulated.
.PHONY: test-gpu bench-gpu

test-gpu: $(NATIVE)
	$(BIN)/python tests/gpu --suites $(SUITES)

bench-gpu: $(NATIVE)
	$(BIN)/python benchmarks/bench_gpu.py
