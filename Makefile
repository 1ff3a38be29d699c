# A fresh machine needs Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint install clean

demo: $(VENV)/installed          ## install, train the demo, end with the table of sub-nets
	$(BIN)/ddnn train

test: $(VENV)/installed          ## install, pass the fast tests
	$(BIN)/pytest -m "not slow"

test-all: $(VENV)/installed      ## the slow tests too
	$(BIN)/pytest

lint: $(VENV)/installed          ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/installed

# constraints.txt holds the versions everything here was measured with.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ddnn needs Python 3.11 or newer; give one with: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
