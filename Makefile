# Every target sets itself up: `make test` and `make demo` need Python, make and pip, nothing else.

PYTHON  ?= python3
WORKERS ?= 2
OUT     ?= runs/demo
ARGS    ?=

# What `make test-oldest` runs with; which build of it (CPU or CUDA), this machine's pip decides.
TORCH_OLDEST ?= torch==2.10.0

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST := .venv-oldest
TREES  := modeling conversion model_cards src tests benchmarks examples docs/*.py

# The exact versions are those of Python 3.11 and later; an older Python resolves from pyproject's lower bounds.
PINNED := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
TORCH  := $(shell grep '^torch==' constraints.txt)

# Idle threads sleep: spinning ones beside another process make small models several times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# A comparison with another program runs where that program's Python is given.
BENCHES := $(filter-out $(if $(MERGEKIT_PYTHON),,%/bench_mergekit.py),$(wildcard benchmarks/bench_*.py))

# A benchmark has the machine to itself, and threads that wait as they do by default.
AS_USERS_DO := env -u OMP_WAIT_POLICY

.DEFAULT_GOAL := help
.PHONY: help install test test-oldest compatibility demo results routers results-tiny ranks bench soak mutation families conformance check format format-check lint package-tree types docs layout clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Set up .venv with everything needed to run, test and develop

$(BIN)/python $(OLDEST)/bin/python: %/bin/python:
	$(PYTHON) -m venv $* || { $(PYTHON) -m venv --without-pip $* && $(PYTHON) -m pip --python $@ install pip; }

# torch comes first and alone, so that the build this machine's pip is set up for (CPU or CUDA) is the one that stays.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(if $(PINNED),$(TORCH),torch)
	$(BIN)/python -m pip install --quiet $(PINNED) --editable '.[dev]'
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH_OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt --editable '.[test]'
	@touch $@

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-oldest: $(OLDEST)/.installed ## Run the tests with the oldest supported versions, in a .venv-oldest of their own
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

compatibility: $(STAMP) ## Run the tests of docs/compatibility.md and write its table
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m promise --write-promises $(ARGS)

demo: $(STAMP) ## Run the main job end to end on a real model and text (10 minutes on 2 cores): OUT=runs/demo
	$(BIN)/flexmoe demo --out $(OUT) $(ARGS)

results: $(STAMP) ## Run eight owners on SmolLM2-135M over 3 seeds, and what else can be done with their text (hours; resumable)
	$(BIN)/python benchmarks/eight_owners.py $(ARGS)

routers: $(STAMP) ## Compare routers on the experts of `make results` (hours; resumable)
	$(BIN)/python benchmarks/routers.py $(ARGS)

results-tiny: $(STAMP) ## Run the demo with its own anchor over 3 seeds, with the paper's recipe and row variants (an hour)
	$(BIN)/python benchmarks/results.py $(ARGS)

ranks: $(STAMP) ## Compress the demo's experts to several ranks, and train them at those (25 minutes beyond the demo)
	$(BIN)/python benchmarks/ranks.py $(ARGS)

bench: $(STAMP) ## Run the benchmarks; each asserts the figures it promises (MERGEKIT_PYTHON=PATH for that comparison)
	@set -e; for file in $(BENCHES); do echo "== $$file"; $(AS_USERS_DO) $(BIN)/python $$file; done
	$(BIN)/python benchmarks/readme_figures.py

# pytest exits with 5 if ARGS select none of its tests.
soak: $(STAMP) ## Run the long randomised tests, and the parameters of other tests that `make test` leaves out
	$(BIN)/python -m pytest tests/soak $(ARGS) || test $$? -eq 5
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m soak $(ARGS) || test $$? -eq 5

mutation: $(STAMP) ## Change the code and list the changes that no test notices (hours): ARGS="routing --every 10"
	$(BIN)/python tests/soak/mutation.py $(ARGS)

families: $(STAMP) ## Check every dense family of transformers and write docs/families.md (some 5 minutes)
	$(BIN)/python tests/soak/families_table.py $(ARGS)

# A run of its own: that folder is a package called `tests`, as ours is.
conformance: $(STAMP) ## Run transformers' own common tests: TRANSFORMERS_TESTS=DIR, the tests folder of that library
	@test -n "$(TRANSFORMERS_TESTS)" || { echo "Say where that library's tests are: make conformance TRANSFORMERS_TESTS=DIR"; exit 2; }
	$(BIN)/python -m pip install --quiet $(PINNED) --editable '.[conformance]'
	TRANSFORMERS_TESTS=$(abspath $(TRANSFORMERS_TESTS)) CONFORMANCE_SUMMARY=$(CURDIR)/docs/benchmarks/conformance.json \
		$(BIN)/python -m pytest tests/conformance -n $(WORKERS) --dist worksteal $(ARGS)

check: format-check lint types layout docs test ## Everything that must pass before a commit

format: $(STAMP) ## Rewrite the code in the project's format
	$(BIN)/ruff format $(TREES)
	$(BIN)/ruff check --select I --fix $(TREES)

format-check: $(STAMP)
	$(BIN)/ruff format --check $(TREES)

lint: $(STAMP) ## Lint
	$(BIN)/ruff check $(TREES)

# Tools that do not follow setuptools' package-dir map are shown the package as an install would lay it out.
package-tree:
	@rm -rf .types && mkdir -p .types/flexmoe
	@ln -s $(CURDIR)/src/flexmoe/* $(CURDIR)/modeling $(CURDIR)/conversion $(CURDIR)/model_cards .types/flexmoe/
	@ln -s $(CURDIR)/src/flexmoe_cli .types/flexmoe_cli

types: $(STAMP) package-tree ## Check the types
	$(BIN)/mypy

docs: $(STAMP) package-tree ## Build the documentation site in build/site, without warnings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

layout: $(STAMP)
	$(BIN)/python -m pytest --quiet tests/test_layout.py

clean: ## Remove caches and the environment, never your runs
	rm -rf $(VENV) $(OLDEST) .types .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
