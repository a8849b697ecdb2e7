# Everything a newcomer runs. `make demo` and `make test` set up what they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTO_VENV ?= .venv-proto
AUDIT_VENV ?= .venv-audit

.PHONY: help setup demo test pods lint audit proto proto-check clean

help:
	@echo "make demo    set up, run a speculative generation through four real processes, compare"
	@echo "make test    set up, lint, type-check, check generated code, run every test"
	@echo "make pods    run the manifests' own pods as processes in network namespaces (root)"
	@echo "make lint    ruff, mypy, import rules"
	@echo "make audit   look dependencies up in PyPI's advisories (needs the network)"
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

# Tests are taken over from the busier of the two: the longest are no more at its end than elsewhere.
test: setup lint proto-check
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Overlays as processes, a network namespace and an address for each pod; wants root, and the cores to itself.
pods: setup
	OUTRIDER_TEST_PODS=1 $(BIN)/python -m pytest tests/deploy/test_pods.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# In an environment of its own: the auditor's own dependencies are none of ours. Strict: what PyPI
# does not know is a failure, not a pass. Builds for one device (torch 2.13.0+cpu) are known without.
$(AUDIT_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet pip-audit
	@touch $@

audit: setup $(AUDIT_VENV)/.ready
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' > $(AUDIT_VENV)/requirements.txt
	$(AUDIT_VENV)/bin/pip-audit --strict --no-deps --disable-pip -r $(AUDIT_VENV)/requirements.txt

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
	rm -rf $(VENV) $(PROTO_VENV) $(AUDIT_VENV)
