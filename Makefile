# Two commands: `make demo` installs and runs the main job, `make test` installs and runs every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The hub is off once everything is installed: nothing here needs it.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test coverage lint install install-dev clean

demo: install
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: install-dev lint
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/test.sh

# The same tests, which take longer for it, and what they do not reach.
coverage: install-dev
	rm -f .coverage .coverage.*
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/test.sh --cov --cov-report=term

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One pip command, so that the constraints hold for torch as well.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
