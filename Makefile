# The doors of this repository. `make help` lists them; each works on its own in a fresh clone.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
MUTANT_ARGS ?=
export CXX ?= g++
export HF_HUB_OFFLINE ?= 1
# torch's OpenMP threads spin after every operation; on a CPU that others use, too, that costs more than all the work.
export OMP_WAIT_POLICY ?= PASSIVE

NATIVE_SOURCES := $(shell find native -type f)
NATIVE_LIBRARY := $(wildcard kt_sft/_native*.so)
# A library that was deleted, or put there by another build, is built again.
NATIVE_STALE := $(if $(NATIVE_LIBRARY),$(shell find $(NATIVE_LIBRARY) -newer $(STAMPS)/native 2>/dev/null),force)
CPP_FILES = $(shell find native tests benchmarks -name '*.h' -o -name '*.cc')
# pytest's default thread count would have two pools fight for the cores in the many small models of the tests.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: help setup demo evaluate test test-long fuzz mutants test-gpu sanitize lint format bench targets clean force
.DELETE_ON_ERROR:

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14
	@echo 'variables: PYTHON=python3.12  CXX=g++-12  TORCH_INDEX=<extra package index for torch>  PYTEST_ARGS="-k name"  DEMO_ARGS="--method int8"'

setup: $(STAMPS)/native  ## .venv with pinned packages, native library built; repeats only what changed

$(STAMPS)/packages: constraints.txt pyproject.toml packaging/setup_env.sh $(wildcard packaging/cpu_stubs/*/pyproject.toml)
	packaging/setup_env.sh $(PYTHON) $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/native: $(STAMPS)/packages setup.py pyproject.toml $(NATIVE_SOURCES) $(NATIVE_STALE)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

demo: setup  ## builds a small MoE, fine-tunes it through LLaMA-Factory, shows answers before and after
	$(PY) scripts/demo/run_demo.py $(DEMO_ARGS)

evaluate: setup  ## after `make demo`: BLEU, ROUGE and accuracy before and after, equality with stock code; docs/evaluation.md
	$(PY) scripts/demo/evaluate.py

test: setup  ## what CI runs
	$(TEST_ENV) $(PY) -m pytest -m "not slow and not fuzz and not gpu" $(PYTEST_ARGS)

test-long: setup  ## everything that this machine can run
	$(TEST_ENV) $(PY) -m pytest -m "not gpu" $(PYTEST_ARGS)

fuzz: setup  ## random damage to all that is read from files and clients, for minutes; python -m tests.fuzz for hours
	$(TEST_ENV) $(PY) -m pytest -m fuzz $(PYTEST_ARGS)

mutants: setup  ## plants faults in a copy of the tree, one at a time: do the tests see them? MUTANT_ARGS="--python-only --only NAME"
	$(PY) -m scripts.mutants $(MUTANT_ARGS)

test-gpu:  ## tests on a CUDA device, and on AMX if it is there, with the machine's own Python; installs nothing
	packaging/test_gpu.sh $(PYTHON) $(PYTEST_ARGS)

sanitize: $(STAMPS)/packages  ## native tests under the address, undefined behaviour and thread sanitizers; random calls of the extension
	packaging/sanitize.sh $(SANITIZERS)

bench: setup  ## quick speed measurement, minutes: expert layer, decoding, single products; results in benchmarks/results/
	$(PY) -m benchmarks.bench_moe_layer $(BENCH_ARGS)
	$(PY) -m benchmarks.bench_decode $(BENCH_ARGS)
	$(PY) -m benchmarks.bench_overhead $(filter --no-save,$(BENCH_ARGS)); status=$$?; \
	  $(PY) -m benchmarks.bench_gemm --plot $(BENCH_ARGS) && $(PY) -m benchmarks.report && exit $$status

targets: setup  ## every speed and memory target with its measured figure; fails if one is missed; under 5 minutes
	$(PY) -m benchmarks.targets $(BENCH_ARGS); status=$$?; $(PY) -m benchmarks.report; exit $$status

lint: $(STAMPS)/packages  ## style of Python and C++, without changing anything
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(STAMPS)/packages  ## the same, changing files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CPP_FILES)

clean:  ## build results and outputs; keeps .venv
	rm -rf build outputs kt_sft/_native*.so kt_sft.egg-info
