.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
PYTHON := python3
BIN := $(VENV)/bin
OUT := runs/demo
IMAGE :=
RUNS :=
# Many small tensors: more threads only help on idle cores.
THREADS := 1

.PHONY: help install lock demo test test-slurm test-soak test-matrix check bench claims gpu clean

help:  ## Show the targets
	@grep -hE '^[a-z_.$$()/-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([^:]+):[^#]*## /\1\t/' | expand -t 12

LOCK := requirements.lock
# Whether it fits: its hashes are of the files for this system, and these Pythons have one of each.
FITS := import platform as p, sys; sys.exit((p.system(), p.machine()) != ("Linux", "x86_64") or not (3, 11) <= sys.version_info < (3, 14))

# The stamp is newer than these exactly when the environment is complete.
$(VENV)/.stamp: pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || true
	@install="$(BIN)/python -m uv pip install --python $(BIN)/python --compile-bytecode"; \
	$(BIN)/python -m uv --version >/dev/null 2>&1 || install="$(BIN)/python -m pip install"; \
	if $(BIN)/python -c '$(FITS)'; then \
		echo "environment: the versions of $(LOCK)"; \
		$$install --require-hashes -r $(LOCK) && $$install --no-deps --no-build-isolation -e .; \
	else \
		echo "environment: the newest versions in the ranges of pyproject.toml ($(LOCK) is for another system or Python)"; \
		$$install -e '.[dev]'; \
	fi
	touch $@

lock:  ## Write requirements.lock anew, from the ranges of pyproject.toml
	$(BIN)/python -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --extra dev pyproject.toml --output-file $(LOCK)

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

claims: $(VENV)/.stamp  ## Write docs/claims.md: make claims [RUNS="PIPELINE:STYLE=FOLDER ..."]
	$(BIN)/galatea claims $(RUNS)

gpu: OUT := runs/gpu
gpu: $(VENV)/.stamp  ## What only a GPU can show, in three minutes, then a picture at real sizes: make gpu [OUT=folder]
	$(BIN)/python -m tests.benchmarks gpu --out $(OUT)
	$(BIN)/python -m tests.benchmarks real_size --device gpu --out $(OUT)/real_size

clean:  ## Remove caches; runs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -print0 | xargs -0 rm -rf
