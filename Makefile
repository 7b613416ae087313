# `make demo` and `make test` do everything on a fresh machine: a virtual environment first, then the work.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test clean
help:
	@echo "make demo    three rounds of self-improvement on the tiny model, minutes on a laptop's CPU"
	@echo "make test    the test suite"
	@echo "make clean   remove the virtual environment and the demo's run"

demo: .venv/ready
	PYTHON=$(CURDIR)/$(BIN)/python ./self_improve.sh

test: .venv/ready
	$(BIN)/python -m pytest -q tests

clean:
	rm -rf .venv runs/demo

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
