# All commands of the project; run `make` to list them.
#
# PYTHON=... uses your own environment, which must have torch, mmcv with compiled operators, mmengine
# and mmdet. By default, commands use VENV, which `make env` creates with the packages of STACK.
# TESTS=... selects tests; default: all.

STACK ?= current
VENV ?= $(patsubst .venv-current,.venv,.venv-$(STACK))
ifeq ($(filter $(STACK),current prebuilt onedl tasks mmyolo),)
$(error STACK must be current, prebuilt, onedl, tasks or mmyolo, not "$(STACK)")
endif

ifdef PYTHON
# Installs nothing: the checkout is put on PYTHONPATH instead.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
SETUP := "$(PYTHON)" tools/setup_env.py --check "$(PYTHON)"
else
PYTHON := $(VENV)/bin/python
SETUP := $(shell command -v python3 || echo python) tools/setup_env.py --venv "$(VENV)" --stack $(STACK)
endif

.DEFAULT_GOAL := help
.PHONY: help env demo bench gpu modelled test test-slow test-all test-prebuilt test-triton
.PHONY: test-mmpretrain test-mmseg test-timm test-mmyolo docs lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env:  ## create or update VENV (takes minutes the first time)
	@$(SETUP)

demo: env  ## draw images, train a detector with RFAConv on them and evaluate it, in minutes
	@"$(PYTHON)" tools/demo.py

WINDOWED := RFAConv RFCBAMConv RFCAConv

bench: env  ## benchmark all operators on 2 CPU threads against formulas and plain convolution
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

gpu: env  ## check and benchmark everything on a GPU in 20 minutes; writes JSON, table and log to OUT
	@"$(PYTHON)" -m benchmarks.gpu --out "$(OUT)"

# Only the current stack has the lint tools.
test: $(if $(filter $(STACK),current),lint,env)  ## lint, then run the fast tests in two processes
	@"$(PYTHON)" -m pytest -q -n 2 --dist worksteal $(TESTS)

test-slow: env  ## run the slow tests in two processes; lists skipped tests
	@"$(PYTHON)" -m pytest -q -rs -n 2 --dist worksteal -m slow $(TESTS)

test-all: $(if $(filter $(STACK),current),lint,env)  ## lint, then run all tests in two processes
	@"$(PYTHON)" -m pytest -q -rs -n 2 --dist worksteal -m "slow or not slow" $(TESTS)

PREBUILT_TESTS := ops layers models checkpoints cli/test_train_and_test.py

test-prebuilt:  ## run the tests that depend most on torch with the prebuilt stack
	@$(MAKE) --no-print-directory test STACK=prebuilt TESTS="$(addprefix tests/,$(PREBUILT_TESTS))"

test-mmpretrain:  ## test the configs of MMPretrain, in an environment with it
	@$(MAKE) --no-print-directory test-slow STACK=tasks TESTS=tests/configs/test_mmpretrain.py

test-mmseg:  ## test the configs of MMSegmentation, in an environment with it
	@$(MAKE) --no-print-directory test-slow STACK=tasks \
	    TESTS="tests/configs/test_mmseg.py tests/compat/test_mmseg_plugins.py"

# Not a slow test.
test-timm:  ## test Retrofit on models of timm, in an environment with it
	@$(MAKE) --no-print-directory test STACK=tasks TESTS=tests/models/retrofit/test_any_module.py

test-mmyolo:  ## train, test and predict with the configs of MMYOLO, in an environment with it
	@$(MAKE) --no-print-directory test-slow STACK=mmyolo TESTS=tests/configs/test_mmyolo.py

# Each version is installed in its own folder, which takes precedence over the environment.
test-triton: env  ## compile the GPU kernels with other versions of Triton
	@set -e; for wanted in $$(sed -n 's/^triton==\([0-9.]*\).*/\1/p' requirements/triton.txt); do \
	    folder=build/triton-$$wanted; \
	    test -d $$folder/triton || \
	        "$(PYTHON)" -m pip install -q --no-deps --target $$folder triton==$$wanted; \
	    echo "Triton $$wanted"; \
	    PYTHONPATH="$$folder$(if $(PYTHONPATH),:$(PYTHONPATH))" "$(PYTHON)" -m pytest -q \
	        -n 2 --dist worksteal tests/ops/receptive_field/test_triton_compile.py; \
	done

modelled: env  ## model the time of the GPU kernels and of cuDNN without a GPU
	@"$(PYTHON)" -m benchmarks.modelled --table benchmarks/modelled.md

DOCS_VENV := .venv-docs

# Needs no torch: the sources are read, not imported.
docs: $(DOCS_VENV)/.stamp  ## build the documentation into site/, to be opened from disk
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

$(DOCS_VENV)/.stamp: requirements/docs.txt
	@python3 -m venv --clear $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

lint: env  ## check style, formatting and types
	@"$(PYTHON)" -m ruff check .
	@"$(PYTHON)" -m ruff format --check .
	@"$(PYTHON)" -m mypy

format: env  ## fix style and formatting automatically
	@"$(PYTHON)" -m ruff check --fix .
	@"$(PYTHON)" -m ruff format .

clean:  ## remove caches and build products; keeps environments and results
	@rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage htmlcov
	@find . -path "./.venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
