# `make demo` and `make test` set up everything they need: a virtual environment and the package with its dependencies.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-all lint format benchmarks ablation clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(READY)  ## Make the virtual environment and install vivit with everything

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vivit needs Python >= 3.11: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[ray,dev]'
	touch $@

demo: $(READY)  ## Run the whole method on a generated video data set (CPU, a few minutes)
	$(BIN)/vivit demo

test: $(READY)  ## Run the tests, without the slow ones
	$(BIN)/python -m pytest

test-all: $(READY)  ## Run all tests
	$(BIN)/python -m pytest -m ''

lint: $(READY)  ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(READY)  ## Run the benchmarks (minutes; results belong in docs/performance.md)
	$(BIN)/python benchmarks/bench_extract.py
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_cache.py
	$(BIN)/python benchmarks/bench_train.py
	$(BIN)/python benchmarks/bench_pretrain.py
	$(BIN)/python benchmarks/bench_step.py
	$(BIN)/python benchmarks/bench_ray.py
	$(BIN)/python benchmarks/bench_augment.py

ablation: $(READY)  ## Run all rows of the paper's table on generated videos (an hour on 2 cores; see docs/paper.md)
	$(BIN)/python benchmarks/paper_ablation.py

clean:  ## Remove the virtual environment and what tools left behind
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
