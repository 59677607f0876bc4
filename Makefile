# Needs nothing but Python 3.11 or newer, git and make. Everything is installed into .venv.

PYTHON ?= python3
# A CPU index spares Linux users the CUDA wheels: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt

# The repository root must stay off sys.path: Hugging Face owns an import package `kernels` too.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check format proto clean

help: ## Print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: .venv/installed ## A real federated fine-tuning, offline, in about a minute
	$(BIN)/fedapt demo --out demo

# Two processes of one thread each: tests are many and small. Each takes half of the files, so that what the tests of a
# file share is made once, and then from the other half what is left.
test: check ## Lint, types and the test suite (some minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

test-slow: .venv/installed-slow ## What takes longer: stock Flower, Ray, wheels, kills, faults, fuzz
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m slow
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m 'hypothesis and not slow' --hypothesis-profile=deep

check: .venv/installed ## Lint and types alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed ## Put the code into the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: .venv/installed ## Generate the link's frames again from protocols/link.proto
	cd typings && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. fedapt/protocols/link.proto

clean: ## Remove what was installed and made
	rm -rf .venv demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedapt needs Python 3.11 or newer; say make PYTHON=python3.12, or whatever yours is called")'
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch)
	$(PIP) -e '.[dev]'
	@touch $@

.venv/installed-slow: .venv/installed
	$(PIP) -e '.[dev,ray]'
	@touch $@
