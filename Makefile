# `make demo` and `make test` do everything on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test check slow long browser hostile oldest newest bench clean
demo: $(VENV)/ready
	$(BIN)/bezoar demo

test: check
	$(BIN)/python -m pytest -q

check: $(VENV)/ready-dev
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

slow: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m slow

long: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m long

browser: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m browser

hostile: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m hostile

# The oldest versions that pyproject.toml allows, and the newest there are, each in an environment of its own.
oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install -q uv
	.venv-oldest/bin/uv pip install -q --python .venv-oldest --resolution lowest-direct -e . \
		"pytest>=8.4" "hypothesis>=6.100" "webdataset>=1.0"
	.venv-oldest/bin/python -m pytest -q

newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install -q -e ".[dev]"
	.venv-newest/bin/python -m pip freeze --exclude-editable | grep -vE "^(nvidia|cuda|triton)" > .venv-newest/versions
	if grep -v "^#" constraints.txt | diff - .venv-newest/versions; \
		then echo "the newest versions are those of constraints.txt"; \
		else .venv-newest/bin/python -m pytest -q; fi

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
	rm -rf $(VENV) .venv-oldest .venv-newest build dist .pytest_cache .mypy_cache .ruff_cache
