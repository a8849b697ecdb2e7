# Everything a newcomer runs. `make demo` and `make test` set up what they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTO_VENV ?= .venv-proto

.PHONY: help setup demo test lint proto proto-check clean

help:
	@echo "make demo    set up, run a speculative generation through four real processes, compare"
	@echo "make test    set up, lint, type-check, check generated code, run every test"
	@echo "make lint    ruff, mypy, import rules"
	@echo "make proto   regenerate outrider/v1 from proto/"
	@echo "make clean   remove the environments"

setup: $(VENV)/.ready

# torch comes first and pinned: asked for as a range it may bring gigabytes of CUDA packages.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Outrider needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/outrider demo

test: setup lint proto-check
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(PROTO_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet grpcio-tools==1.76.0 setuptools
	@touch $@

proto: $(PROTO_VENV)/.ready
	$(PROTO_VENV)/bin/python scripts/gen_proto.py

# The committed stubs are what the contracts say.
proto-check: $(PROTO_VENV)/.ready
	$(PROTO_VENV)/bin/python scripts/gen_proto.py --check

clean:
	rm -rf $(VENV) $(PROTO_VENV)
