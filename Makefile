# Every command of the project. `make` alone lists them.
#
# PYTHON=... runs them in an environment of yours that already has torch, mmcv with compiled
# operators, mmengine and mmdet; without it they run in VENV, which `make env` creates and fills
# with the packages of STACK. TESTS=... are the tests to run; without it, all.

STACK ?= current
VENV ?= $(patsubst .venv-current,.venv,.venv-$(STACK))
ifeq ($(filter $(STACK),current prebuilt onedl),)
$(error STACK must be current, prebuilt or onedl, not "$(STACK)")
endif

ifdef PYTHON
# Nothing is installed there: the checkout itself is put on the module path.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
SETUP := "$(PYTHON)" tools/setup_env.py --check "$(PYTHON)"
else
PYTHON := $(VENV)/bin/python
SETUP := $(shell command -v python3 || echo python) tools/setup_env.py --venv "$(VENV)" --stack $(STACK)
endif

.DEFAULT_GOAL := help
.PHONY: help env demo bench gpu modelled test test-slow test-all test-prebuilt test-triton
.PHONY: lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env:  ## create VENV with everything in it (minutes the first time, then no time)
	@$(SETUP)

demo: env  ## draw images, train a detector with RFAConv on them, evaluate and picture it, in minutes
	@"$(PYTHON)" tools/demo.py

WINDOWED := RFAConv RFCBAMConv RFCAConv

bench: env  ## measure every op on 2 CPU threads against the formulas and the plain convolution
	@"$(PYTHON)" -m benchmarks.run --compile RFAConv --detector 256 \
	    --out benchmarks/results/cpu.json
	@"$(PYTHON)" -m benchmarks.run --ops RFAConv --dtype bfloat16 \
	    --out benchmarks/results/cpu_bfloat16.json
	@for k in 5 7; do "$(PYTHON)" -m benchmarks.run --ops $(WINDOWED) --shapes few \
	    --kernel-size $$k --out benchmarks/results/cpu_$${k}x$$k.json || exit 1; done
	@"$(PYTHON)" -m benchmarks.report benchmarks/results/*.json \
	    --table benchmarks/table.md --plot docs/images/benchmark.png
	@"$(PYTHON)" -m benchmarks.documents

OUT ?= work_dirs/gpu

gpu: env  ## check and measure everything on a GPU in ten minutes; JSON, table and log in OUT
	@"$(PYTHON)" -m benchmarks.gpu --out "$(OUT)"

# The tools of lint are pinned in the current stack only.
test: $(if $(filter $(STACK),current),lint,env)  ## lint, then the tests that take seconds, in two processes
	@"$(PYTHON)" -m pytest -q -n 2 --dist worksteal $(TESTS)

test-slow: env  ## the tests that take minutes, in two processes; says what was skipped, and why
	@"$(PYTHON)" -m pytest -q -rs -n 2 --dist worksteal -m slow $(TESTS)

test-all: test test-slow  ## lint, then every test

PREBUILT_TESTS := ops layers models checkpoints cli/test_train_and_test.py

test-prebuilt:  ## the tests of what depends most on torch, with the packages of prebuilt
	@$(MAKE) --no-print-directory test STACK=prebuilt TESTS="$(addprefix tests/,$(PREBUILT_TESTS))"

# Each in a folder of its own, which goes before the environment's.
test-triton: env  ## compile the kernels for GPUs with other versions of Triton
	@set -e; for wanted in $$(sed -n 's/^triton==\([0-9.]*\).*/\1/p' requirements/triton.txt); do \
	    folder=build/triton-$$wanted; \
	    test -d $$folder/triton || \
	        "$(PYTHON)" -m pip install -q --no-deps --target $$folder triton==$$wanted; \
	    echo "Triton $$wanted"; \
	    PYTHONPATH="$$folder$(if $(PYTHONPATH),:$(PYTHONPATH))" "$(PYTHON)" -m pytest -q \
	        -n 2 --dist worksteal tests/ops/receptive_field/test_triton_compile.py; \
	done

modelled: env  ## model the time of the kernels on a GPU that is not there, beside cuDNN's
	@"$(PYTHON)" -m benchmarks.modelled --table benchmarks/modelled.md

lint: env  ## check style, format and types
	@"$(PYTHON)" -m ruff check .
	@"$(PYTHON)" -m ruff format --check .
	@"$(PYTHON)" -m mypy

format: env  ## fix style and format where that is automatic
	@"$(PYTHON)" -m ruff check --fix .
	@"$(PYTHON)" -m ruff format .

clean:  ## remove caches and build products; the environment and results stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage htmlcov
	@find . -path "./.venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
