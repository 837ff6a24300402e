# `make demo` and `make test` do all the set-up on a fresh machine. `make help` lists the rest.

PYTHON ?= python3
# A release that the tests ran with. Anything that pip takes: make demo TORCH="torch==2.13.0 --index-url URL"
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# What decides whether an installation is still the right one; Python sources are not copied by it.
INSTALLED := pyproject.toml $(wildcard CMakeLists.txt) $(wildcard src/serpent_ir/ops/cpu/csrc/*)

.PHONY: help demo test test-all test-newest test-lowest docs gallery faults wheels clean

help:
	@echo "make demo    restore a degraded sample photo; the result is demo/side-by-side.png"
	@echo "make test    format, lint, types, layers, the documentation and tests"
	@echo "make test-all   the same with slow doubles of tests: every level, platform and capability"
	@echo "make test-newest   the tests with the newest PyTorch, or with another: TORCH=\"torch==2.11.*\""
	@echo "make test-lowest   the tests with PyTorch 2.9, the lowest that the package takes"
	@echo "make docs    the documentation site, in site/; a broken link or reference fails"
	@echo "make gallery the pictures of its gallery anew, with the weights that are here"
	@echo "make faults  a campaign of 1,000 injected faults, at most 20 minutes; a table of held and broken"
	@echo "make wheels  the wheels of all platforms, in dist/, built on this machine"
	@echo "make clean   remove $(VENV), demo/ and caches"
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or later), TORCH=\"$(TORCH)\""

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/demo.py demo

test-all: MARKED := -m ""
test-all: test

test: $(VENV)/.dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
# A thread for each process: several processes with as many threads as cores wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal $(MARKED)

# With the lowest PyTorch that the package takes, in the same environment.
test-lowest:
	$(MAKE) test-newest TORCH="torch==2.9.*"

# With the newest PyTorch that pip finds, in an environment of its own. Anything that pip takes, as above: another
# index has CPU builds.
test-newest: TORCH = torch
test-newest:
	rm -f .venv-newest/.torch-installed  # another may have come, or been asked for
	$(MAKE) VENV=.venv-newest TORCH="--upgrade $(TORCH)" .venv-newest/.dev-installed
	.venv-newest/bin/python -c 'import torch; print("PyTorch", torch.__version__)'
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest --numprocesses logical --maxprocesses 4 --dist worksteal $(MARKED)

# The variable keeps the theme from printing a notice about another program.
docs: $(VENV)/.dev-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gallery: $(VENV)/.dev-installed
	$(BIN)/python tools/gallery.py

# Outside CI, where tests/test_faults.py runs a slice.
faults: $(VENV)/.dev-installed
	PYTHONPATH=tests $(BIN)/python -m faults $(FAULTS)

wheels: $(VENV)/.dev-installed
	$(BIN)/python tools/wheels.py dist

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "serpent-ir needs Python 3.11 or later, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and by itself: the package asks only for a lower bound.
$(VENV)/.torch-installed: | $(VENV)/.created
	$(PIP) $(TORCH)
	@touch $@

# Not `demo`, whose web page brings a web server and half a hundred packages.
$(VENV)/.demo-installed: $(INSTALLED) | $(VENV)/.torch-installed
	$(PIP) -e '.[samples]'
	@touch $@

# BRISQUE brings a library in C++ without a wheel; where no compiler is found its tests are skipped.
$(VENV)/.dev-installed: $(INSTALLED) | $(VENV)/.torch-installed
	$(PIP) -e '.[dev]'
	if command -v g++ > /dev/null; then $(PIP) -e '.[dev,brisque]'; fi
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest demo build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
