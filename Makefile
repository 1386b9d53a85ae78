# Set-up and the two commands of the README. Everything is installed into .venv/; the stamps in it make later calls quick.
#   PYTHON=...      the Python the environment is made from (3.11 or newer)
#   TORCH_SPEC=...  another PyTorch than the pinned one, as pip takes it: "torch==2.13.0 --index-url URL"; remembered
#   DEMO_ARGS=...   arguments of the demo
#   TEST_ARGS=...   arguments of pytest
#   TEST_JOBS=2     files of tests that run at once; 0: in one process, for a debugger

PYTHON ?= $(shell if python3.11 -c '' 2>/dev/null; then echo python3.11; else echo python3; fi)
VENV := .venv
TEST_JOBS := 2
# The environment's programs first: PyTorch looks for ninja on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SPEC := $(or $(strip $(TORCH_SPEC)),$(shell cat $(VENV)/torch-spec 2>/dev/null))
CONSTRAINTS := $(if $(SPEC),$(VENV)/constraints.txt,constraints.txt)

.PHONY: help install install-dev demo test test-all test-slurm lint format clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

install: $(VENV)/installed  ## Make .venv/ with the package and DeepSpeed's cpu_adam

install-dev: $(VENV)/installed-dev  ## The same with what tests need

demo: $(VENV)/installed  ## Train, export and evaluate the demo
	$(VENV)/bin/python tools/demo.py $(DEMO_ARGS)

test: lint  ## Lint, then the quick tier of the tests with coverage
	$(VENV)/bin/python -m coverage erase
	$(VENV)/bin/python -m coverage run -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)
	$(VENV)/bin/python -m coverage combine --quiet
	$(VENV)/bin/python -m coverage report $(if $(findstring -k,$(TEST_ARGS))$(findstring tests/,$(TEST_ARGS)),--fail-under=0)

test-all: $(VENV)/installed-dev  ## Every test, a file at a time; goes on where it was stopped (ALL_ARGS: tools/test_all.py --help)
	$(VENV)/bin/python tools/test_all.py $(ALL_ARGS)

test-slurm: $(VENV)/installed-dev  ## All that is done to a SLURM cluster, as root (about half an hour)
	$(VENV)/bin/python -m pytest -m '' -s tests/test_slurm_jobs.py tests/test_slurm_failures.py $(TEST_ARGS)

lint: $(VENV)/installed-dev  ## Check style and types
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/python -m mypy

format: $(VENV)/installed-dev  ## Format the code
	$(VENV)/bin/python -m ruff check --fix
	$(VENV)/bin/python -m ruff format

clean:  ## Remove .venv/ and what tools leave behind; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*

$(VENV)/bin/python:
	@sh tools/check_system.sh "$(PYTHON)"
	"$(PYTHON)" -m venv --clear $(VENV)

# Rewritten only when another PyTorch is asked for, so that nothing is installed again for the same one.
$(VENV)/torch-spec: FORCE | $(VENV)/bin/python
	@printf '%s\n' '$(SPEC)' | cmp -s - $@ || printf '%s\n' '$(SPEC)' > $@

FORCE:

INPUTS := setup.py constraints.txt $(VENV)/torch-spec

define install
@sh tools/check_system.sh $(VENV)/bin/python
$(if $(SPEC),$(VENV)/bin/python -m pip install $(foreach word,$(SPEC),'$(word)'))
$(if $(SPEC),grep -v '^torch==' constraints.txt > $(CONSTRAINTS))
$(VENV)/bin/python -m pip install -c $(CONSTRAINTS) -e '$(1)'
$(VENV)/bin/python tools/build_ops.py
@touch $(2)
endef

$(VENV)/installed: $(INPUTS)
	$(call install,.,$@)

$(VENV)/installed-dev: $(INPUTS)
	$(call install,.[dev],$(VENV)/installed $@)
