# Everything runs in .venv, which the first target that needs it builds. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := kvpipe.kvcache kvpipe.data kvpipe.pipeline kvpipe.cli

.DEFAULT_GOAL := help
.PHONY: help install ab-experiment smoke test test-faults lint format typecheck check builtin-teacher bench golden clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED) ## make .venv with everything, at the tested versions

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# ARGS goes to the command: make ab-experiment ARGS='--set name=mine --set extract.dataset=mine.jsonl'
ab-experiment: $(INSTALLED) ## the A/B: extract if needed, all arms and seeds, report in reports/ab
	$(BIN)/kvpipe experiment run experiments/ab.toml $(ARGS)

smoke: $(INSTALLED) ## a few samples and ten steps of every mode, in a temporary folder
	$(BIN)/python benchmarks/smoke.py

test: $(INSTALLED) ## the quick test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-faults: $(INSTALLED) ## the whole fault-injection suite, with its counts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/faults --faults full

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## rewrite the sources in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy reads no import hooks, so the package name is laid over the folders as one link.
typecheck: $(INSTALLED) ## mypy, strict
	@mkdir -p build/typecheck && ln -sfn ../.. build/typecheck/kvpipe
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))

check: lint typecheck test ## all of it

builtin-teacher: $(INSTALLED) ## train a built-in teacher again: make builtin-teacher TEACHER=qwen
	$(BIN)/python -m kvpipe.pipeline.builtin_teacher $(or $(TEACHER),qwen)

bench: $(INSTALLED) ## extraction, reading, verify, steps and totals, as ratios
	$(BIN)/python benchmarks/run_all.py

golden: $(INSTALLED) ## write the golden store again; only for a new schema version
	$(BIN)/python tests/golden/make_golden.py

clean: ## remove what make built
	rm -rf $(VENV) build *.egg-info
