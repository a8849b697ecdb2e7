# Commands for development. `make demo` and `make test` create .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTO_VENV ?= .venv-proto
AUDIT_VENV ?= .venv-audit
UV_VENV ?= .venv-uv
UV := $(UV_VENV)/bin/uv
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo test test-without-avx512 test-quick test-newest test-oldest pods shown lint audit lock proto proto-check reference site browser clean

help:
	@echo "make demo         generate with and without drafts through four real processes; compare"
	@echo "make test         lint, type-check, check generated code, run every test"
	@echo "make test-quick   run all tests except the slow ones: under 3 minutes"
	@echo "make test-newest  test engine, services and end to end with the newest allowed dependencies"
	@echo "make test-oldest  the same with the oldest allowed dependencies"
	@echo "make pods         run the pods of the manifests as processes in network namespaces (root)"
	@echo "make shown        run the commands that README, get-started and how-to pages show: minutes"
	@echo "make lint         run ruff, mypy and the import rules"
	@echo "make setup        create .venv with the locked versions (demo and test do it too)"
	@echo "make lock         pin the newest allowed versions in requirements/ (needs PyPI)"
	@echo "make audit        check dependencies against PyPI's advisories (needs network)"
	@echo "make proto        generate outrider/v1 from proto/"
	@echo "make reference    generate docs/reference/{flags,commands,metrics,errors,supported-models}.md"
	@echo "make site         write the documentation as a site to build/site"
	@echo "make browser      install Chromium for the tests of the page, if it is missing (root, apt-get)"
	@echo "make clean        remove the environments"

setup: $(VENV)/.ready

# compileall compiles 12,000 modules on all cores, pip on one; packages' own tests are never imported. A few
# modules are templates and do not compile.
# With a GPU: torch's CUDA build and FlashInfer from PyPI, by hash. Without: torch's CPU build from torch's
# own index, by version. If that index is unreachable, pip uses the other configured indexes.
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
	@$(BIN)/python -m compileall -qq -j0 -x '/site-packages/.*/tests/' $(VENV)/lib || true
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable . --editable outrider_bench
	$(BIN)/python -m pip check
	@touch $@

demo: setup
	$(BIN)/outrider demo

# Three workers on two cores, as tests wait a third of their time. All tests of a file run on one worker, which
# shares its fixtures; tests/conftest.py puts the long files first. On a CPU with AVX-512 the engine's tests
# run twice, the first time with AVX-512 disabled, in parallel with linting and type checking.
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder
# Write bytecode in any environment: tests start hundreds of programs.
unexport PYTHONDONTWRITEBYTECODE
WITHOUT_AVX512 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2
test:
	$(MAKE) -j3 lint proto-check test-without-avx512
	$(BIN)/python -m pytest $(WORKERS)

# Slow tests start programs; their computation is covered by the other tests.
test-without-avx512: setup
	@if grep -qm1 avx512f /proc/cpuinfo; then set -x; \
		$(WITHOUT_AVX512) $(BIN)/python -m pytest $(WORKERS) tests/engine -m "not gpu and not slow"; fi

# The inner loop: tests that are not marked slow.
test-quick: setup
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

# Both ends of the ranges of the runtime dependencies, resolved at run time, with the newest test tools.
# UV_TORCH_BACKEND=cpu saves 3 GB of CUDA packages if torch's own index is reachable.
RANGE_TESTS := tests/engine tests/services tests/e2e tests/sampling tests/orchestrator
test-newest: RESOLUTION := highest
test-oldest: RESOLUTION := lowest-direct
test-newest test-oldest: test-%: $(UV_VENV)/.ready
	$(UV) venv --quiet --clear --python $(UV_VENV)/bin/python .venv-$*
	$(UV) pip compile --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION) \
		--extra model --output-file .venv-$*/runtime.txt pyproject.toml
	$(UV) pip install --quiet --python .venv-$* --constraint .venv-$*/runtime.txt --editable '.[dev,model]' --editable outrider_bench
	$(UV) pip list --python .venv-$*
	.venv-$*/bin/python -m pytest $(WORKERS) $(RANGE_TESTS)

# Runs overlays as processes, one network namespace and address per pod. Needs root and an idle machine.
pods: setup
	OUTRIDER_TEST_PODS=1 $(BIN)/python -m pytest tests/deploy/test_pods.py

# Runs what the documents show with real processes; tests/shown/plan.py says what is replaced or not run.
shown: setup
	OUTRIDER_TEST_SHOWN=1 $(BIN)/python -m pytest -n 0 tests/shown

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# In an environment of its own, as a lock that does not match pyproject.toml cannot be installed.
$(UV_VENV)/.ready: Makefile
	$(PYTHON) -m venv --clear $(UV_VENV)
	$(UV_VENV)/bin/python $(PIP_INSTALL) uv==0.13.9
	@touch $@

lock: $(UV_VENV)/.ready
	$(UV_VENV)/bin/python scripts/lock.py

# In an environment of its own, apart from the auditor's dependencies. Strict: a package unknown to PyPI is
# a failure. Local versions (torch 2.13.0+cpu) are looked up without the suffix.
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

# Fails if the committed stubs do not match proto/.
proto-check: $(PROTO_VENV)/.ready
	$(PROTO_VENV)/bin/python scripts/gen_proto.py --check

# The committed pages are compared by tests/test_reference.py.
reference: setup
	$(BIN)/python scripts/reference.py

site: setup
	$(BIN)/python -m mkdocs build

# Elsewhere, tests/services/test_page.py is skipped without a Chromium or Chrome.
browser:
	@command -v chromium || command -v google-chrome || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium; } >/dev/null

clean:
	rm -rf $(VENV) $(PROTO_VENV) $(AUDIT_VENV) $(UV_VENV) .venv-newest .venv-oldest
