# The commands that people and CI use. Every target works in a fresh clone: it installs what it needs first.

PYTHON ?= $(firstword $(shell command -v python3.11 python3 python))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet --quiet
SOURCE ?=
SHELL := /bin/bash
MARKS := not gpu

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-fast lint types imports check bench bench-pipeline bench-step verify-resume vit-h chaos submit-pinned clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/setup.stamp ## install everything for development into .venv

# Two stages in one .venv: the demo does not need the test tools, and starts sooner without them.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tarmac needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Tarmac into $(VENV) (some minutes) ..."
	@$(PIP) install --editable '.[gpu,demo]' --constraint constraints.txt
	@touch $@

$(VENV)/setup.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Tarmac and its test tools into $(VENV) (some minutes) ..."
	@$(PIP) install --editable '.[gpu,test,bench,demo]' --constraint constraints.txt
	@touch $(VENV)/demo.stamp $@

demo: $(VENV)/demo.stamp ## photographs to a trained MAE on local S3 and Ray, with a kill; SOURCE=/path uses your images
	@$(BIN)/python -m cluster.demo $(if $(SOURCE),--source "$(SOURCE)")

# A test opens the report page in a browser: yours, or Debian's where this may install it.
$(VENV)/browser.stamp: | $(BIN)/python
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "Installing Debian's chromium ..." && \
	  { apt-get update && apt-get install --yes --no-install-recommends chromium; } >$(VENV)/browser.log 2>&1; } || \
	  echo "no Chromium here: the test that opens a report in one is skipped (Debian: apt-get install chromium)"
	@! command -v chromium chromium-browser google-chrome >/dev/null || touch $@

# Ray tests start a cluster each and measure its restarts: they run after the others, one at a time.
test: setup $(VENV)/browser.stamp ## every test that runs without a GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope -m 'not ray and $(MARKS)'; status=$$?; \
	$(BIN)/pytest -m 'ray and $(MARKS)' && exit $$status

test-fast: setup ## the tests without servers, Ray and long runs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope -m 'not slow and not servers and not ray and $(MARKS)'

lint: setup ## ruff: rules and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup ## mypy, strict
	$(BIN)/mypy

imports: setup ## import-linter: who may import whom
	$(BIN)/lint-imports

check: lint types imports ## lint, types and imports

# What asks for older packages than ours, and runs with ours, comes without its dependencies. Where it cannot be had,
# its row of the table says so.
$(VENV)/peers.stamp: benchmarks/peers/no-deps.txt $(VENV)/setup.stamp
	@$(PIP) install --no-deps --requirement benchmarks/peers/no-deps.txt || echo "not all peers are installed"
	@touch $@

bench: setup $(VENV)/peers.stamp ## every benchmark here; results go to build/bench
	@set -e; for name in $(sort $(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))); do \
	  echo "== $$name"; $(BIN)/python -m "benchmarks.$$name"; done

bench-pipeline: setup $(VENV)/peers.stamp ## the loader against seven others and the limit; SOURCE=/path uses your photographs
	@$(BIN)/python -m benchmarks.pipeline $(if $(SOURCE),--source "$(SOURCE)")

bench-step: setup $(VENV)/peers.stamp ## the training step against three others and the limit of matrix products; 40 minutes
	@$(BIN)/python -m benchmarks.step

verify-resume: setup ## two runs, one killed twice: are the final weights the same bits?
	@$(BIN)/python -m tests.chaos.verify_resume

vit-h: setup ## ViT-H/14 on this machine: six steps, a checkpoint to S3, a kill, a resume; needs 24 GiB and 20 GB of disk
	@$(BIN)/python -m tests.chaos.vit_h

chaos: setup ## every fault done to a run on a real cluster, and a bad night beside Ray's own pattern; an hour and more
	@$(BIN)/python -m tests.chaos.chaos

submit-pinned: setup ## a cluster with Ray alone installs the pinned environment for a job; minutes, and 10 GB of disk
	@$(BIN)/python -m tests.chaos.submit_pinned

clean: ## remove everything that was made here, except .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
