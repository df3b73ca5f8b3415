# Needs make, and Python 3.11 or newer with pip. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Stamps record what is installed, so each set is installed once, and again when its inputs change.
MADE := $(VENV)/.made
PACKAGE := $(VENV)/.installed-package
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
BENCH := $(VENV)/.installed-bench
NEURAL := .venv-neural-tangents
INPUTS := pyproject.toml constraints.txt

# One thread a process, because the tests already run on all cores.
test explore: export OMP_NUM_THREADS = 1
explore: export HYPOTHESIS_PROFILE = explore

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test explore lint format theory results bench bench-neural-tangents dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(PACKAGE) ## set up, and reproduce the kernel alignment figures into runs/kernel-alignment
	$(BIN)/adaptive-tangents reproduce kernel-alignment --out runs/kernel-alignment

test: lint ## set up, lint, and run every test on all cores
	$(BIN)/python -m pytest -n auto --dist loadgroup

explore: $(DEV) ## run the property tests on new random examples, ten times as many
	$(BIN)/python -m pytest -n auto --dist loadgroup -m hypothesis --timeout 3000

lint: $(DEV) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(DOCS) ## build the site into site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

theory: ## write docs/theory.md from docs/theory.in.md; needed after source lines move
	$(PYTHON) docs/make_theory.py

results: $(PACKAGE) ## write docs/results.md from docs/results/; RUNS=folder first copies results that reproduce all made there
	$(BIN)/python docs/make_results.py $(RUNS)

bench: $(BENCH) ## run the benchmarks one by one, and put their tables into docs/benchmarks.md
	@failed=; for script in benchmarks/bench_*.py; do \
		if [ ! -e "$$script" ]; then echo "there is no benchmarks/bench_*.py"; exit 1; fi; \
		echo "== $$script, $$(date +%T)"; $(BIN)/python "$$script" || failed="$$failed $$script"; \
	done; \
	$(BIN)/python benchmarks/tables.py; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

bench-neural-tangents: $(BENCH) $(NEURAL)/.installed ## compare with neural-tangents; make bench includes it from then on
	$(BIN)/python benchmarks/bench_kernel.py --matching '(adaptive|neural)-tangents'
	$(BIN)/python benchmarks/bench_convolutions.py --matching 'CNN: (adaptive|neural)-tangents'

dist: $(DEV) ## build the sdist and the wheel into dist/, and check them as a package index does
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

clean: ## remove caches and build outputs; keep environments and runs
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "adaptive-tangents needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
		echo "name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(PACKAGE): $(MADE) $(INPUTS)
	$(PIP) -e '.[report]'
	@touch $@

# The extras include the package, so it need not be installed separately.
$(DEV): $(MADE) $(INPUTS)
	$(PIP) -e '.[dev]'
	@touch $(PACKAGE) $(DOCS) $@

$(DOCS): $(MADE) $(INPUTS)
	$(PIP) -e '.[docs]'
	@touch $@

$(BENCH): $(MADE) $(INPUTS)
	$(PIP) -e '.[bench]'
	@touch $(PACKAGE) $@

# neural-tangents needs its own environment: it works only with an old jax, which needs an old numpy.
$(NEURAL)/.installed: benchmarks/neural_tangents/requirements.txt
	$(PYTHON) -m venv $(NEURAL)
	$(NEURAL)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
