# `make demo` and `make test` do everything on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test check slow long browser bench clean
demo: $(VENV)/ready
	$(BIN)/bezoar demo

test: check
	$(BIN)/python -m pytest -q

check: $(VENV)/ready-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

slow: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m slow

long: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m long

browser: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m browser

bench: $(VENV)/ready-dev
	for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
