# Every target makes the environment itself when it is missing.
PYTHON ?= python3.11
VENV := .venv
STORE := .venv-store
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: help setup demo sweep test test-all test-real test-chaos test-cuda lint bench clean

help:            ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.done $(STORE)/.done   ## make both environments (the package's, the embedded S3 server's)

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(STORE)/.done: constraints-store.txt
	$(PYTHON) -m venv $(STORE)
	$(STORE)/bin/python -m pip install --quiet -c constraints-store.txt swift
	touch $@

demo: setup      ## phantoms in an S3 server -> pretrain -> finetune -> evaluate -> register -> predict -> one page
	$(BIN)/python jobs/demo.py

sweep: setup     ## the paper's Table 14 on phantoms: 9 trials, killed with SIGKILL in the middle, resumed
	rm -rf sweep-run
	$(BIN)/python jobs/demo_sweep.py --dir sweep-run

test: setup      ## the default tests: CPU only, under 12 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: setup  ## also the slow ones
	$(BIN)/python -m pytest -m 'not real and not chaos and not cuda'

test-real: setup ## real scans through 'ray job submit' with 16 workers; wants ../shared/data
	$(BIN)/python -m pytest -m real

test-chaos: setup ## kills drivers and workers, tears checkpoints, and compares bit for bit
	$(BIN)/python -m pytest -m chaos

test-cuda: setup ## wants a GPU
	$(BIN)/python -m pytest -m cuda

lint: setup      ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

LONG := $(addprefix benchmarks/,hippocampus.py pretexts.py scaling.py table1.py)
bench: setup     ## the short benchmarks; each prints a table and, last, one JSON line
	for b in $(filter-out $(LONG),$(wildcard benchmarks/[a-z]*.py)); do echo "== $$b"; $(BIN)/python $$b || exit 1; done

clean:           ## environments, caches and the demo's folder
	rm -rf $(VENV) $(STORE) demo-run sweep-run build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
