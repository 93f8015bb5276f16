# On a machine without a GPU, PyTorch's own CPU index saves gigabytes; other accelerators have theirs:
#   make demo TORCH="torch==2.13.0 --index-url <from pytorch.org/get-started>"
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := .venv/bin
# Tests and benches start several processes; more threads than cores would only make them wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check bench clean

help: ## Say what there is
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: .venv/.core ## Train a small model with 2 processes on Python's own sources, then let it write
	@scripts/demo.sh

# What measures no time and shares no network runs two at a time.
BESIDE := $(addprefix tests/,checkpoint config data inference mesh model parallel plan precision schedule) \
	$(addprefix tests/tasks/test_,dryrun.py plan.py plan_search.py plan_trace.py plan_validate.py schedule_show.py) \
	tests/test_cli.py tests/test_hardware.py

test: .venv/.dev ## Run all tests
	$(BIN)/pytest -n 2 --dist loadfile $(BESIDE)
	$(BIN)/pytest $(addprefix --ignore=,$(BESIDE))

check: .venv/.dev ## Lint, formatting, types, the rules of the tree, written tables, and what kernels take of every GPU
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/rules
	$(BIN)/python scripts/list_hardware.py --check
	$(BIN)/python scripts/draw_leaderboard.py --check
	$(BIN)/python scripts/compile_kernels.py --check

bench: .venv/.dev ## Run every benchmark
	@for bench in scripts/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench || exit 1; done

clean: ## Remove what these targets made: .venv, .demo, caches
	rm -rf .venv .demo build dist .pytest_cache .ruff_cache .mypy_cache

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check $(TORCH)
	@touch $@

.venv/.core: .venv/.torch pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e .
	@touch $@

.venv/.dev: .venv/.core pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $@
