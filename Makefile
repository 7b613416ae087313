# `make demo` and `make test` do everything on a fresh machine: a virtual environment first, then the work.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint coverage clean
help:
	@echo "make demo       three rounds of self-improvement on a tiny Janus (FAMILY=showo: a tiny Show-o), minutes on a laptop's CPU"
	@echo "make test       the test suite"
	@echo "make lint       what ruff and mypy have to say"
	@echo "make coverage   the tests once more, one after the other: which lines of the scripts they reach (half an hour)"
	@echo "make clean      remove the virtual environment and the demo's run"

demo: .venv/ready
	PYTHON=$(CURDIR)/$(BIN)/python ./self_improve.sh

SLOW := tests/test_faults.py tests/test_loop.py  # real processes, killed and started again: half of the time

test: .venv/ready
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest -q -p no:cacheprovider $(SLOW) >.slow-tests.log 2>&1 & slow=$$!; \
	$(BIN)/python -m pytest -q tests $(SLOW:%=--ignore=%); fast=$$?; \
	wait $$slow; slow=$$?; cat .slow-tests.log; exit $$((fast + slow))

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: .venv/lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests --cov --cov-report=term

clean:
	rm -rf .venv runs/demo runs/demo-showo

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/lint: .venv/ready requirements-lint.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-lint.txt
	touch $@
