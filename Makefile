.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
PYTHON := python3
BIN := $(VENV)/bin
OUT := runs/demo
IMAGE :=
# Many small tensors: more threads only help on idle cores.
THREADS := 1

.PHONY: help install demo test test-slurm test-soak test-matrix check bench clean

help:  ## Show the targets
	@grep -hE '^[a-z_.$$()/-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([^:]+):[^#]*## /\1\t/' | expand -t 12

# The stamp is newer than pyproject.toml exactly when the environment is complete.
$(VENV)/.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || true
	if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
		$(BIN)/python -m uv pip install --python $(BIN)/python -e '.[dev]'; \
	else \
		$(BIN)/python -m pip install -e '.[dev]'; \
	fi
	touch $@

install: $(VENV)/.stamp  ## Create .venv with everything in it

demo: $(VENV)/.stamp  ## One artwork to a turnable head: make demo [IMAGE=portrait.jpg] [OUT=folder]
	$(BIN)/galatea run configs/pipelines/artform.yaml --image $(or $(IMAGE),assets/artworks) --out $(OUT)

test: $(VENV)/.stamp  ## Run the tests
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n auto

test-slurm: $(VENV)/.stamp  ## Run the tests that start a SLURM cluster here (root in a container; see tests/slurm)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m slurm tests/slurm

test-soak: $(VENV)/.stamp  ## Kill stages and a pipeline at random moments and compare (about ten minutes)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m soak tests/soak

test-matrix: $(VENV)/.stamp  ## Every stage in one, two and three processes and in every precision (some minutes)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m 'matrix or not matrix' tests/stages/test_distributed.py

check: $(VENV)/.stamp  ## Style, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/.stamp  ## Time the main operations
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m tests.benchmarks

clean:  ## Remove caches; runs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -print0 | xargs -0 rm -rf
