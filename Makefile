# A fresh machine needs Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

# Fast tests of a file share what it makes; slow ones are few and long, so that an idle worker takes some of another's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4

.PHONY: demo test test-slow test-all test-lowest examples lint install clean

demo: $(VENV)/installed          ## install, train the demo, end with the table of sub-nets
	$(BIN)/ddnn train

test: $(VENV)/installed          ## install, pass the fast tests
	$(PYTEST) --dist loadfile -m "not slow"

test-slow: examples              ## the others, those of the examples among them
	$(PYTEST) --dist worksteal -m slow

test-all: examples               ## all of them
	$(PYTEST) --dist loadfile

test-lowest:                     ## the fast tests with the oldest versions that pyproject.toml allows: gigabytes
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=$(LOWEST) $(LOWEST)/bin/uv pip install --quiet --resolution lowest-direct -e '.[dev]'
	$(subst $(BIN),$(LOWEST)/bin,$(PYTEST)) --dist loadfile -m "not slow" -o filterwarnings=ignore

lint: $(VENV)/installed          ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

examples: $(VENV)/examples       ## what the files in examples/ need besides: 200 MB, half a minute
install: $(VENV)/installed

# constraints.txt holds the versions everything here was measured with.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ddnn needs Python 3.11 or newer; give one with: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/examples: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,examples]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST)
