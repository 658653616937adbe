# Everything here runs without root. PYTHON picks the interpreter (3.11 or newer), VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-run

.PHONY: help setup demo test test-all lint pillow-simd clean

help:
	@echo "make demo      the whole line on embedded data, into $(OUT)/ (minutes)"
	@echo "make test      the tests, the slow ones left out"
	@echo "make test-all  all tests that need no GPU"
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

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: setup lint
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-all: setup lint
	$(BIN)/python -m pytest -m 'not gpu'

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .ruff_cache .hypothesis
