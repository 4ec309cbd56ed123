# Every target makes the environment itself when it is missing.
PYTHON ?= python3.11
VENV := .venv
STORE := .venv-store
NNUNET := build/nnunet
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: help setup demo sweep chaos test test-all test-real test-chaos drill docs-run faults fuzz test-cuda test-nnunet test-services lint audit bench gpu-site docs clean

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
	$(BIN)/python -m tools.demo

sweep: setup     ## the paper's Table 14 on phantoms: 9 trials, killed with SIGKILL in the middle, resumed
	rm -rf sweep-run
	$(BIN)/python -m tools.demo_sweep --dir sweep-run

chaos: setup     ## 20 kills of every stage, compared with the undisturbed run; goes on where it was
	$(BIN)/logonet chaos

test: setup      ## the default tests: CPU only, about 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: setup  ## also the slow ones
	$(BIN)/python -m pytest -m 'not real and not chaos and not faults and not fuzz and not cuda and not nnunet and not services and not docs_run'

test-real: setup ## real scans through 'ray job submit' with 16 workers; wants ../shared/data
	$(BIN)/python -m pytest -m real

test-chaos: setup ## kills drivers and workers, tears checkpoints, and compares bit for bit
	$(BIN)/python -m pytest -m chaos

drill: setup     ## machines with claimed GPUs come and go, the head is lost; ends with a page of what happened when
	$(BIN)/python -m tools.drill

docs-run: setup  ## starts the cluster of docs/cluster.md on three machines of their own, and runs its commands; wants root
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m docs_run tests/test_docs_run.py

faults: setup    ## whole pipelines through a store of which one request in twenty fails, and what that costs
	$(BIN)/python -m pytest -m faults
	$(BIN)/python benchmarks/faults.py

test-cuda: setup ## wants a GPU
	$(BIN)/python -m pytest -m cuda

$(NNUNET)/.done: constraints-nnunet.txt
	$(PYTHON) -m venv $(NNUNET)
	$(NNUNET)/bin/python -m pip install --quiet -c constraints-nnunet.txt torch torchvision
	$(NNUNET)/bin/python -m pip install --quiet -c constraints-nnunet.txt nnunetv2
	touch $@

test-nnunet: setup $(NNUNET)/.done ## the released nnU-Net finetunes our checkpoints, on phantoms and on real scans where they are
	LOGONET_NNUNET=$(abspath $(NNUNET)) $(BIN)/python -m pytest -m nnunet tests/test_nnunet.py

test-services: setup ## MLflow on PostgreSQL and S3, Prometheus on a submitted job; wants Debian's postgresql and prometheus
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m services tests/test_services.py

fuzz: setup      ## damaged scans, lists, settings, weights and checkpoints: a sentence or quarantine, never more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fuzz -rP tests/test_fuzz.py

lint: setup      ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Strict: a package that the advisory service does not know is a failure, not a pass.
AUDIT := --strict --no-deps --disable-pip --progress-spinner off
audit: setup     ## known vulnerabilities of every pinned package (asks PyPI), broken requirements, licences
	test -d .venv-audit || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1 pip-licenses==5.5.5
	.venv-audit/bin/pip-licenses --python=$(BIN)/python --summary --order=count
	$(BIN)/python -m pip check
	$(STORE)/bin/python -m pip check
	.venv-audit/bin/pip-audit $(AUDIT) -r constraints.txt
	.venv-audit/bin/pip-audit $(AUDIT) -r constraints-store.txt

LONG := $(addprefix benchmarks/,chunks.py faults.py hippocampus.py pretexts.py scale.py scaling.py table1.py)
bench: setup     ## the short benchmarks; each prints a table and, last, one JSON line
	for b in $(filter-out $(LONG),$(wildcard benchmarks/[a-z]*.py)); do echo "== $$b"; $(BIN)/python $$b || exit 1; done

# For a machine with a GPU, Python 3.12 and torch that reaches nothing outside. Botocore describes every service of AWS.
WHEELS := --python-version 3.12 --only-binary :all: --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64
gpu-site: setup  ## what benchmarks/gpu.py needs beside torch, in build/gpu-site.tar.xz
	rm -rf build/gpu-site
	$(BIN)/python -m pip install -q --no-deps $(WHEELS) --target build/gpu-site -c constraints.txt -r benchmarks/gpu.txt
	find build/gpu-site/botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 -exec rm -r {} +
	find build/gpu-site -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -r {} +
	XZ_OPT=-6 tar -C build -cJf build/gpu-site.tar.xz gpu-site

docs: $(VENV)/.done ## the site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:           ## environments, caches and the demo's folder
	rm -rf $(VENV) $(STORE) .venv-audit demo-run sweep-run chaos-run drill-run site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
