# Two commands do everything, including the virtual environment:
#   make suites   the main job: improve and gate the real tasks
#   make test     lint, types, architecture and unit tests
# Options go through ARGS:  make suites ARGS="--copa-budget=medium -k iris"

PYTHON ?= python3
VENV   ?= .venv
BUDGET ?= light
ARGS   ?=

BIN := $(VENV)/bin
# Two busy processes on few cores: OpenMP's spinning barriers would make torch ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: suites test lint types unit clean help
.DEFAULT_GOAL := help

help:
	@sed -n '2,4p' Makefile | sed 's/^# //'

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "==> creating $(VENV) and installing copa-harness (once; a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "copa-harness needs Python >= 3.10; say which with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

suites: $(VENV)/.installed
	@echo "==> pytest suites/ --copa-budget=$(BUDGET) $(ARGS)"
	@$(BIN)/python -m pytest suites/ --copa-budget=$(BUDGET) $(ARGS)

test: lint types unit

lint: $(VENV)/.installed
	@echo "==> ruff check"
	@$(BIN)/ruff check .

types: $(VENV)/.installed
	@echo "==> mypy --strict copa_harness"
	@$(BIN)/mypy

unit: $(VENV)/.installed
	@echo "==> pytest tests/ -n 2 $(ARGS)"
	@$(BIN)/python -m pytest tests/ -q -n 2 $(ARGS)

clean:
	rm -rf $(VENV) .copa_cache .pytest_cache .mypy_cache .ruff_cache
