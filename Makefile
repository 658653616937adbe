# Everything here runs without root. PYTHON picks the interpreter (3.11 or newer), VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-run

.PHONY: help setup demo test test-all lint types docs coverage coverage-schemas pillow-simd clean

help:
	@echo "make demo      the whole line on embedded data, into $(OUT)/ (minutes)"
	@echo "make test      the tests, the slow ones left out"
	@echo "make test-all  all tests that need no GPU"
	@echo "make lint      ruff and mypy"
	@echo "make coverage  all tests that need no GPU, and the share of lines that they run"
	@echo "make docs      the reference of the Python interface, into build/docs"
	@echo "make setup     only the environment, $(VENV)"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e '.[dev]'
	@$(MAKE) --no-print-directory pillow-simd
	@touch $@

# pillow-simd owns the same PIL/ folder as Pillow, which other packages require by name: it goes in last and on top.
# Without a compiler or headers this step says so and changes nothing.
pillow-simd:
	@BIN=$(BIN) sh docker/install-pillow-simd.sh

demo: setup
	$(BIN)/zpipe demo $(OUT)

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads the folders where pyproject.toml installs them, below zpipe: as links, so that it names the files by their place.
types: setup
	@mkdir -p build/types/zpipe
	@ln -sf $(addprefix ../../../,$(wildcard zpipe/*.py)) build/types/zpipe/
	@ln -sfn ../../../schemas build/types/zpipe/schemas
	@ln -sfn ../../../pipeline build/types/zpipe/pipeline
	@ln -sfn ../../../train build/types/zpipe/train
	$(BIN)/python -m mypy

# A warning is an error.
docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs/api build/docs
	@echo "build/docs/index.html"

# Minutes more than `make test-all`, whose business failures are: processes start slower here, and a test that kills one at a
# moment of its own choosing may miss it. The thresholds are those of CONTRIBUTING.md.
coverage: setup
	$(BIN)/python -m coverage erase
	-$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not gpu'
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --include='*/schemas/*,*/pipeline/*' --fail-under=95
	$(BIN)/python -m coverage report --include='*/train/*' --fail-under=85

# Only the contracts, by the tests that are about them.
coverage-schemas: setup
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -q tests/test_schemas.py tests/test_relevance_store.py tests/test_formats.py \
		tests/test_remote_store.py tests/test_verify.py tests/test_make_shards.py
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --include='*/schemas/*' --fail-under=95

# Much of a test's time is the start of processes, so two files run side by side; a file's tests stay together for what they share.
# In the order of their names: xdist's own puts files of few tests last, and those are the slow ones.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup lint
	$(PYTEST) -m 'not slow and not gpu'

# The slow ones one at a time: they load the machine themselves.
test-all: test
	$(BIN)/python -m pytest -m 'slow and not gpu'

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage .coverage.*
