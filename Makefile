# Everything a person needs; `make help` lists it. Settings for CPU stages: scripts/env.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
include scripts/env

BIN := $(CURDIR)/.venv/bin
# Stage commands call a bare `python`: it has to be the environment's. Not exported, so that setup finds the system's.
IN := PATH="$(BIN):$$PATH"
GPU := $(shell nvidia-smi -L 2>/dev/null)

.PHONY: help setup run smoke test test-all lint doctor clean distclean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

setup:  ## make .venv with pinned dependencies (at once when up to date)
	@sh scripts/setup.sh

run: setup  ## the whole pipeline (dvc repro), then the result table
	@"$(BIN)/python" scripts/unlock.py
	@$(IN) "$(BIN)/dvc" repro
	@$(IN) "$(BIN)/ragdistill" table
	@echo "report:  results/report.html"
	@echo "next:    . .venv/bin/activate && . scripts/env, then: ragdistill promote | dvc exp run -S hints.k=1 | ragdistill --help"

smoke: setup  ## the same pipeline, tiny, in a workspace of its own
	@$(IN) "$(BIN)/ragdistill" smoke

test: setup  ## fast tests
	@$(IN) "$(BIN)/python" -m pytest -q

test-all: setup  ## all tests that this machine can run, slow ones too
	@$(IN) "$(BIN)/python" -m pytest -q -m "not gpu"
	@$(if $(GPU),$(IN) "$(BIN)/python" -m pytest -q -m gpu || [ $$? = 5 ])

lint: setup  ## style, format and types
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@$(IN) "$(BIN)/pyright"

doctor: setup  ## what this machine has and lacks
	@$(IN) "$(BIN)/ragdistill" doctor

clean:  ## remove tool caches; results, journal and .venv stay
	@rm -rf .pytest_cache .ruff_cache .hypothesis build src/*.egg-info
	@find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## also remove .venv; results and journal stay
	@rm -rf .venv
