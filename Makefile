# Every target does its own set-up; an environment is made once, and updated when setup.py changes.

PYTHON ?= python3
# The test suite runs in this many processes, with one thread each.
WORKERS ?= 2
# For example: make test PYTEST_ARGS="-k interaction -x"
PYTEST_ARGS ?=

PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest tests -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# The lowest versions that setup.py allows.
OLDEST = "torch==2.9.*" "torchvision==0.24.*" transformers==5.17.0 timm==1.0.23

.PHONY: help demo test test-oldest lint format

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: .venv/installed  ## fine-tune a small PIIP on handwritten digits, save it, reload it, use it
	.venv/bin/python scripts/demo.py

test: .venv/installed  ## run the test suite
	$(call PYTEST,.venv)

test-oldest: .venv-oldest/installed  ## run the test suite with the oldest supported versions
	$(call PYTEST,.venv-oldest)

lint: .venv/installed  ## check style, imports and formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/installed  ## repair what lint can repair
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -e ".[dev]"
	touch $@

.venv-oldest/installed: setup.py Makefile
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -e ".[dev]" $(OLDEST)
	touch $@
