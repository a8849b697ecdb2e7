# Everything a newcomer runs. `make demo` and `make test` set up what they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTO_VENV ?= .venv-proto
AUDIT_VENV ?= .venv-audit
UV_VENV ?= .venv-uv
UV := $(UV_VENV)/bin/uv
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo test test-without-avx512 test-quick test-newest test-oldest pods lint audit lock proto proto-check clean

help:
	@echo "make demo         set up, run a speculative generation through four real processes, compare"
	@echo "make test         set up, lint, type-check, check generated code, run every test"
	@echo "make test-quick   all tests but the slow ones: under 3 minutes"
	@echo "make test-newest  engine, services and end-to-end tests with the newest dependencies allowed"
	@echo "make test-oldest  the same with the oldest dependencies allowed"
	@echo "make pods         run the manifests' own pods as processes in network namespaces (root)"
	@echo "make lint         ruff, mypy, import rules"
	@echo "make lock         pin the newest allowed versions in requirements/ (needs PyPI)"
	@echo "make audit        look dependencies up in PyPI's advisories (needs the network)"
	@echo "make proto        regenerate outrider/v1 from proto/"
	@echo "make clean        remove the environments"

setup: $(VENV)/.ready

# pip compiles 14,000 modules on one core, compileall on all; a few that are templates do not compile.
# With a GPU: torch's CUDA build and FlashInfer, from PyPI, by hash. Without: torch's CPU build, which is
# on torch's own index, by version; where that index cannot be reached, pip takes what other indexes have.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ifeq ($(shell command -v nvidia-smi),)
TORCH := --retries 1 --extra-index-url $(TORCH_INDEX) -r requirements/torch.txt
else
TORCH := --require-hashes --no-deps -r requirements/model-cuda.txt
endif

$(VENV)/.ready: pyproject.toml outrider_bench/pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "The lock is for Python 3.11, 3.12 and 3.13; try make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(PIP_INSTALL) --no-compile --require-hashes --no-deps -r requirements/dev.txt
	$(BIN)/python $(PIP_INSTALL) --no-compile $(TORCH)
	@$(BIN)/python -m compileall -qq -j0 $(VENV)/lib || true
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable . --editable outrider_bench
	$(BIN)/python -m pip check
	@touch $@

demo: setup
	$(BIN)/outrider demo

# Three workers on two cores: tests wait a third of their time. A file stays with one worker, for its fixtures;
# tests/conftest.py puts the long files first. The engine's tests run twice where the CPU has AVX-512, the
# first time as if it had not, beside what uses one core only: installing, linting, checking types.
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder
# Bytecode is kept whatever the caller's environment says: tests start hundreds of programs.
unexport PYTHONDONTWRITEBYTECODE
WITHOUT_AVX512 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
test:
	$(MAKE) -j3 lint proto-check test-without-avx512
	$(BIN)/python -m pytest $(WORKERS)

# The slow ones are programs, which compute nothing that the others do not.
test-without-avx512: setup
	@if grep -qm1 avx512f /proc/cpuinfo; then set -x; \
		$(WITHOUT_AVX512) $(BIN)/python -m pytest $(WORKERS) tests/engine -m "not gpu and not slow"; fi

# The inner loop. Every other test is marked slow.
test-quick: setup
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

# The ends of the ranges of the runtime dependencies, resolved on the day, under the newest test tools.
# UV_TORCH_BACKEND=cpu saves 3 GB of CUDA packages where torch's own index can be reached.
RANGE_TESTS := tests/engine tests/services tests/e2e tests/sampling tests/orchestrator
test-newest: RESOLUTION := highest
test-oldest: RESOLUTION := lowest-direct
test-newest test-oldest: test-%: $(UV_VENV)/.ready
	$(UV) venv --quiet --clear --python $(UV_VENV)/bin/python .venv-$*
	$(UV) pip compile --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION) \
		--extra engine --output-file .venv-$*/runtime.txt pyproject.toml
	$(UV) pip install --quiet --python .venv-$* --constraint .venv-$*/runtime.txt --editable '.[dev,engine]' --editable outrider_bench
	$(UV) pip list --python .venv-$*
	.venv-$*/bin/python -m pytest $(WORKERS) $(RANGE_TESTS)

# Overlays as processes, a network namespace and an address for each pod; wants root, and the cores to itself.
pods: setup
	OUTRIDER_TEST_PODS=1 $(BIN)/python -m pytest tests/deploy/test_pods.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# In an environment of its own: a lock that does not fit pyproject.toml yet cannot be installed.
$(UV_VENV)/.ready: Makefile
	$(PYTHON) -m venv --clear $(UV_VENV)
	$(UV_VENV)/bin/python $(PIP_INSTALL) uv==0.13.9
	@touch $@

lock: $(UV_VENV)/.ready
	$(UV_VENV)/bin/python scripts/lock.py

# In an environment of its own: the auditor's dependencies are none of ours. Strict: a package
# that PyPI does not know is a failure. Local versions (torch 2.13.0+cpu) are looked up without the suffix.
$(AUDIT_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python $(PIP_INSTALL) pip-audit
	@touch $@

audit: setup $(AUDIT_VENV)/.ready
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' > $(AUDIT_VENV)/requirements.txt
	$(AUDIT_VENV)/bin/pip-audit --strict --no-deps --disable-pip -r $(AUDIT_VENV)/requirements.txt

$(PROTO_VENV)/.ready: requirements/proto.txt
	$(PYTHON) -m venv --clear $(PROTO_VENV)
	$(PROTO_VENV)/bin/python $(PIP_INSTALL) --require-hashes -r requirements/proto.txt
	@touch $@

proto: $(PROTO_VENV)/.ready
	$(PROTO_VENV)/bin/python scripts/gen_proto.py

# The committed stubs are what the contracts say.
proto-check: $(PROTO_VENV)/.ready
	$(PROTO_VENV)/bin/python scripts/gen_proto.py --check

clean:
	rm -rf $(VENV) $(PROTO_VENV) $(AUDIT_VENV) $(UV_VENV) .venv-newest .venv-oldest
