# The two commands: `make train` and `make test`. Everything is made in .venv; nothing else on the machine is touched.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: help setup train docs test check compat faults soak clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(READY)  ## make .venv with the pinned versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

train: $(READY)  ## prepare the quickstart data, train, evaluate, report
	@$(BIN)/perceiver prepare digits data/digits
	@$(BIN)/perceiver train recipes/train/quickstart.yaml

docs: $(READY)  ## build the documentation into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: $(READY) docs  ## lint, format, types, import contracts, private names, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m tests.contracts

test: check  ## check, then the whole test suite: the fast tests on two cores at a time, then the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --durations 15

faults: $(READY)  ## inject faults into real runs and print the table (about an hour); ARGS="--repeat 3 --record FILE"
	@$(BIN)/python -m tests.faults $(ARGS)

soak: $(READY)  ## train for an hour with a fault injected per minute and print the goodput
	@$(BIN)/python -m tests.faults.soak

OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13
compat: $(READY)  ## fast tests and quickstart on the oldest and the newest versions, each in a separate environment
	@$(BIN)/python -m tests.compat oldest=$(OLDEST_PYTHON) newest=$(NEWEST_PYTHON)

clean:  ## remove what was made here, .venv too
	rm -rf $(VENV) data runs build *.egg-info .pytest_cache .ruff_cache
