# Every target works from nothing but Python, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

.PHONY: demo test test-floors test-vllm lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/proxsparse demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

# The lowest transformers and datasets that pyproject.toml allows, with what they need. torch stays
# that of constraints.txt: a wheel of the declared floor, 2.10, is a CUDA build of gigabytes, so that
# floor is NOT tested here; `make test-floors FLOOR_TORCH=torch==2.10.0` tests it where there is room.
FLOORS ?= .venv-floors
FLOOR_TORCH ?= torch==2.13.0
FLOOR_TESTS := tests/test_pack.py tests/test_hf.py tests/test_cli.py tests/test_checkpoint_files.py \
	tests/test_pruning.py tests/test_wrapped_models.py tests/test_sparse_linear_module.py

test-floors: $(FLOORS)/.installed
	$(FLOORS)/bin/python -m pytest -m "not slow" $(FLOOR_TESTS)

$(FLOORS)/.installed: pyproject.toml setup.py constraints-floors.txt $(SOURCES)
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet -c constraints-floors.txt "$(FLOOR_TORCH)" -e . \
		pytest pytest-timeout hypothesis peft
	touch $@

# The plug-in of vLLM, in engines on the CPU. Importing vLLM takes half a minute, so the tests share
# one process; what starts servers, or a tensor-parallel engine, has more.
VLLM ?= .venv-vllm

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm

$(VLLM)/.installed: pyproject.toml setup.py requirements-vllm.txt $(SOURCES)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

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
	rm -rf $(VENV) $(FLOORS) $(VLLM) build dist site *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f proxsparse/*.so proxsparse/_build_error_*.txt
