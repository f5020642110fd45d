# make demo: the main job on real data.  make demo-text: a real sentence encoder.  make test: all tests.
# make quick: under a minute of them.  make docs: the documentation as a site.
# make test-isa: those that compare sums of floats, as other CPUs compute them (FEW=--few: five settings of eighteen).
# Each sets up what it needs; a second run reuses it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo demo-text examples test fuzz quick test-isa lint types contract rooms doctest check bench docs clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

demo-text: $(VENV)/.text
	$(BIN)/python examples/demo_text.py

examples: $(VENV)/.demo
	for script in examples/[0-9]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

fuzz: $(VENV)/.test
	NETWORKS=2000 $(BIN)/python -m pytest -n 2 tests/composition/test_networks.py

quick: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --quick

test-isa: $(VENV)/.test
	$(BIN)/python tools/isa.py $(FEW)

doctest: $(VENV)/.test
	$(BIN)/python -m pytest --doctest-modules sophq_func -p no:cacheprovider

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contract: $(VENV)/.dev
	$(BIN)/lint-imports

rooms: | $(VENV)/bin/python
	$(BIN)/python tools/rooms.py --torch

check: lint types contract rooms doctest test

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/interception.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/numerics.py
	$(BIN)/python benchmarks/speed.py

# Into site/; a warning is an error. The tutorials' networks are too small for threads; the other variables silence
# advertisements, which are no warnings of the build.
docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[demo]"
	touch $@

$(VENV)/.text: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[text]"
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[test,demo]"
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[docs]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[test,demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo_out demo_text_out site
