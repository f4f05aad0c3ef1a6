# `make demo` and `make test` do everything on a fresh machine with Python 3.11+, pip, git, make and gcc.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-elastic lint types checks format env dev clean

demo: $(VENV)/.installed  ## set up, then pretrain a small model on text found on this machine
	@$(BIN)/python launch/demo.py

test: $(VENV)/.installed-dev  ## all tests, under 15 minutes on two cores
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev  ## unit tests only
	$(BIN)/python -m pytest -m "not distributed"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

checks: lint types test  ## format, lint, types, tests

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

env: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; run make PYTHON=/path/to/python3.12")'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "installing relora_mora and its dependencies into $(VENV) (minutes, the first time)"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools of the tests into $(VENV)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
