# Everything here runs without root. PYTHON picks the interpreter (3.11 or newer), VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-run

.PHONY: help setup demo test test-all test-gpu check format lint types type-links docs coverage coverage-schemas pillow-simd clean

help:
	@echo "make demo      the whole line on embedded data, into $(OUT)/ (minutes)"
	@echo "make test      the tests, the slow ones left out"
	@echo "make test-all  all tests that need no GPU"
	@echo "make test-gpu  the tests that need a GPU, one at a time"
	@echo "make check     lint, types and tests of one file: make check FILE=train/fit/loop.py"
	@echo "make format    ruff format, and what ruff and oxlint can mend by themselves"
	@echo "make lint      ruff, oxlint and mypy"
	@echo "make coverage  all tests that need no GPU, and the share of lines that they run"
	@echo "make docs      the reference of the Python interface, into build/docs"
	@echo "make setup     only the environment, $(VENV)"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e '.[dev]'
	@$(MAKE) --no-print-directory pillow-simd
	@touch $@

# pillow-simd owns the same PIL/ folder as Pillow, which other packages require by name, so it is installed last, over Pillow.
# Without a compiler or headers, this step prints that and changes nothing.
pillow-simd:
	@BIN=$(BIN) sh docker/install-pillow-simd.sh

demo: setup
	$(BIN)/zpipe demo $(OUT)

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/oxlint --deny-warnings train/report

format: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/oxlint --fix --quiet train/report

# One file: its lint, its types, and the tests that tests/tests_of.py finds for it, slow ones left out.
check: setup type-links
	@test -f "$(FILE)" || { echo "error: no file '$(FILE)'; name one: make check FILE=train/fit/loop.py" >&2; exit 2; }
ifeq ($(suffix $(FILE)),.py)
	$(BIN)/ruff check $(FILE)
	$(BIN)/ruff format --check $(FILE)
ifneq ($(filter zpipe/% schemas/% pipeline/% train/%,$(FILE)),)
	$(BIN)/python -m mypy --follow-imports=silent build/types/zpipe/$(FILE:zpipe/%=%)
endif
endif
ifeq ($(suffix $(FILE)),.js)
	$(BIN)/oxlint --deny-warnings $(FILE)
endif
	@tests=$$($(BIN)/python tests/tests_of.py $(FILE)) && $(BIN)/python -m pytest -q -m 'not slow and not gpu' $$tests

types: setup type-links
	$(BIN)/python -m mypy

# mypy reads the folders where pyproject.toml installs them, below zpipe: as links, so that it names files by their place.
type-links:
	@rm -rf build/types && mkdir -p build/types/zpipe
	@ln -s $(addprefix ../../../,$(wildcard zpipe/*.py) zpipe/py.typed) build/types/zpipe/
	@ln -sfn ../../../schemas build/types/zpipe/schemas
	@ln -sfn ../../../pipeline build/types/zpipe/pipeline
	@ln -sfn ../../../train build/types/zpipe/train

# A warning is an error.
docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs/api build/docs
	@echo "build/docs/index.html"

# Takes minutes more than `make test-all`, which is the one to find failures with: processes start more slowly here, so a
# test that kills one at a certain moment may miss it. The thresholds are those of CONTRIBUTING.md.
coverage: setup
	$(BIN)/python -m coverage erase
	-$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not gpu'
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --include='*/schemas/*,*/pipeline/*' --fail-under=95
	$(BIN)/python -m coverage report --include='*/train/*' --fail-under=85

# Only the formats on disk, by their own tests.
coverage-schemas: setup
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -q tests/schemas tests/pipeline/test_verify.py tests/pipeline/test_make_shards.py
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --include='*/schemas/*' --fail-under=95

# Tests spend much of their time on starting processes, so two files run side by side; the tests of a file share fixtures and
# stay together. Files run in the order of their names: xdist's own order puts files of few tests last, and those are slow.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup lint
	$(PYTEST) -m 'not slow and not gpu'

# Slow tests run one at a time, because each of them uses the whole machine.
test-all: test
	$(BIN)/python -m pytest -m 'slow and not gpu'

# One at a time, because they measure and limit the memory of the one GPU.
test-gpu: setup
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('error: make test-gpu: torch sees no CUDA device here; run it where zpipe doctor shows a GPU')"
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage .coverage.*
