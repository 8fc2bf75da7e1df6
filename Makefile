# Every target sets up what it needs first (scripts/bootstrap.py: .venv, torch, the native build).
PYTHON ?= python3
SETUP = PY=$$($(PYTHON) scripts/bootstrap.py
CPP = find csrc tests tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
RUN = PYTHONPATH=$(CURDIR) $$PY

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench gpu build clean

help: ## this list
	@echo "make TARGET, on a machine with Python >= 3.10, g++ and a package index:"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile

demo: ## a real chat model as it is, patched, and in fastlm's own decoder: an answer, a table, a plot
	@$(SETUP) demo) && $(RUN) scripts/demo.py $(ARGS)

# Passive: threads that spin for others' work take the processors from the tests beside them.
test: ## all tests (ARGS="tests/ops -x" for some), side by side where pytest-xdist is installed
	@$(SETUP) test) && OMP_WAIT_POLICY=passive $(RUN) -m pytest $$($$PY -c "import xdist" 2>/dev/null \
	  && echo "-n logical --maxprocesses 8 --dist worksteal") $(ARGS)

lint: ## ruff, clang-format, mypy
	@$(SETUP) dev) && $(RUN) -m ruff check . && $(RUN) -m ruff format --check . \
	  && $(CPP) | xargs "$$(dirname $$PY)/clang-format" --dry-run -Werror \
	  && $(RUN) -m mypy

format: ## rewrites the sources the way lint wants them
	@$(SETUP) dev) && $(RUN) -m ruff check --fix . && $(RUN) -m ruff format . \
	  && $(CPP) | xargs "$$(dirname $$PY)/clang-format" -i

bench: ## times every operator against PyTorch, each result checked first
	@$(SETUP) bench) && $(RUN) -m benchmarks $(ARGS)

gpu: ## on a machine with an NVIDIA GPU: builds for it, tests, measures (RESULTS=dir STAGES=test,bench)
	@$(PYTHON) tools/gpu.py $(if $(RESULTS),--results "$(RESULTS)") \
	  $(if $(STAGES),--stages "$(STAGES)") $(ARGS)

build: ## compiles the native kernels that changed
	@$(SETUP)) && echo "built; Python: $$PY"

clean: ## removes what was built and the .venv
	rm -rf build dist .venv *.egg-info fastlm/*.so
