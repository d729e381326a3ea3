# Every command of the project. `make` alone lists them.
#
# PYTHON=... runs them in an environment of yours that already has torch, mmcv with compiled
# operators, mmengine and mmdet; without it they run in VENV, which `make env` creates and fills.

VENV ?= .venv

ifdef PYTHON
# Nothing is installed there: the checkout itself is put on the module path.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
SETUP := "$(PYTHON)" tools/setup_env.py --check "$(PYTHON)"
else
PYTHON := $(VENV)/bin/python
SETUP := $(shell command -v python3 || echo python) tools/setup_env.py --venv "$(VENV)"
endif

.DEFAULT_GOAL := help
.PHONY: help env demo bench test test-slow test-all lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env:  ## create .venv with everything in it (minutes the first time, then no time)
	@$(SETUP)

demo: env  ## draw images, train a detector with RFAConv on them, evaluate and picture it, in minutes
	@"$(PYTHON)" tools/demo.py

bench: env  ## measure every op on 2 CPU threads against the formulas and the plain convolution
	@"$(PYTHON)" -m benchmarks.run --compile RFAConv --detector 256 \
	    --out benchmarks/results/cpu.json
	@"$(PYTHON)" -m benchmarks.run --ops RFAConv --dtype bfloat16 \
	    --out benchmarks/results/cpu_bfloat16.json
	@"$(PYTHON)" -m benchmarks.report benchmarks/results/*.json \
	    --table benchmarks/table.md --plot docs/images/benchmark.png

test: lint  ## lint, then the tests that take seconds, in two processes
	@"$(PYTHON)" -m pytest -q -n 2 --dist worksteal

test-slow: env  ## the tests that take minutes, in two processes
	@"$(PYTHON)" -m pytest -q -n 2 --dist worksteal -m slow

test-all: test test-slow  ## lint, then every test

lint: env  ## check style, format and types
	@"$(PYTHON)" -m ruff check .
	@"$(PYTHON)" -m ruff format --check .
	@"$(PYTHON)" -m mypy

format: env  ## fix style and format where that is automatic
	@"$(PYTHON)" -m ruff check --fix .
	@"$(PYTHON)" -m ruff format .

clean:  ## remove caches and build products; the environment and results stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage htmlcov
	@find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
