# `make demo` and `make test` do everything on a fresh machine: a virtual environment first, then the work.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-all test-gpu lint coverage clean
help:
	@echo "make demo       three rounds of self-improvement on a tiny Janus (FAMILY=showo, tar: another), minutes on a laptop's CPU"
	@echo "make test       the tests that a change needs at least: minutes"
	@echo "make test-all   all tests: a quarter of an hour"
	@echo "make test-gpu   on a machine with a GPU: whether it computes what a CPU does"
	@echo "make lint       what ruff and mypy have to say"
	@echo "make coverage   the tests once more, one after the other: which lines of the scripts they reach (half an hour)"
	@echo "make clean      remove the virtual environment and the demo's run"

demo: .venv/ready
	PYTHON=$(CURDIR)/$(BIN)/python ./self_improve.sh

# Two processes on two cores, which take about equally long: the files named here, and all the rest; $(1) are flags.
LOOPS := $(addprefix tests/test_, faults.py loop.py docs.py malformed.py dynamics.py families.py)
define two-halves
@export OMP_NUM_THREADS=1; \
$(BIN)/python -m pytest -q -p no:cacheprovider $(1) $(LOOPS) >.loops.log 2>&1 & loops=$$!; \
$(BIN)/python -m pytest -q $(1) tests $(LOOPS:%=--ignore=%); rest=$$?; \
wait $$loops; loops=$$?; cat .loops.log; exit $$((rest + loops))
endef

test: .venv/ready
	$(call two-halves,--quick)

# MINUTES: after so many begin nothing more of what is thorough, which comes last: for a machine that may be slow.
test-all: .venv/ready
	$(call two-halves,$(MINUTES:%=--minutes %))

# All other tests hide every GPU from themselves (tests/conftest.py).
test-gpu: .venv/ready
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make test-gpu: torch sees no GPU here')"
	GPU_TESTS=1 $(BIN)/python -m pytest -q tests/test_gpu.py

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: .venv/lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests --cov --cov-report=term

clean:
	rm -rf .venv runs/demo runs/demo-showo runs/demo-tar

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/lint: .venv/ready requirements-lint.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-lint.txt
	touch $@
