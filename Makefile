# Every target works from nothing but Python, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

.PHONY: demo test lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/proxsparse demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(wildcard tests/emulator/* benchmarks/*.cu)

# Not quietly: with -q mkdocs counts no warnings, and strict mode passes everything.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/make_api.py --check
	$(BIN)/python benchmarks/make_tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The editable install is repeated when what it depends on has changed.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist site *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f proxsparse/*.so proxsparse/_build_error_*.txt
