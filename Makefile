# Each target does its own set-up; a second call reuses .venv. PYTHON= chooses the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What is in the environment: Python alone, with what the demo needs, with everything.
PYTHON_STAMP := $(VENV)/.created
DEMO_STAMP   := $(VENV)/.installed-demo
STAMP        := $(VENV)/.installed
OLDEST ?= build/oldest
# Tests run side by side, on eight cores at most. The tests of a file share a process, and so what they have set up.
WORKERS := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long test-oldest pairs lint docs bench browser clean help

help:
	@echo "make demo         see the whole product work on real images, then open TensorBoard"
	@echo "make test         run the tests but for the long ones"
	@echo "make test-long    run the long ones, and those with random examples once more with many"
	@echo "make test-oldest  run them with the oldest versions of torch, Lightning and the rest that are allowed"
	@echo "make pairs        train in pairs, without and with a guard, over all options and callbacks of Lightning"
	@echo "make lint         ruff and mypy"
	@echo "make docs         build the documentation: build/docs/index.html"
	@echo "make browser      install a Chromium, without which the tests that open pages are skipped"
	@echo "make bench        run the benchmarks and write their tables"
	@echo "make clean        remove the environments and everything that was generated"

# It waits for no more than it needs, unless everything is there.
demo: $(if $(wildcard $(STAMP)),$(STAMP),$(DEMO_STAMP))
	$(BIN)/gradguard demo

test: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-long: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) -m "slow or hypothesis" --hypothesis-profile=thorough

# Old versions warn of much that is no concern of ours, which is then no error.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(WORKERS) -W default

# Lightning's own tests are in none of its packages, so these go through its options and callbacks in their place.
pairs: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) tests/pairs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Anything wrong in it, such as a link to nowhere, is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open build/docs/index.html."

# Debian's package where it can be installed, else the build that Playwright brings.
browser: $(STAMP)
	command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		test "$$(id -u)" = 0 && command -v apt-get && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	} || $(BIN)/playwright install chromium

bench: $(STAMP)
	set -e; for script in benchmarks/*.py; do $(BIN)/python $$script; done
	$(BIN)/python benchmarks/detection.py --held-out --seeds 2

clean:
	rm -rf $(VENV) build dist runs lightning_logs test-artifacts .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A new constraints.txt or pyproject.toml makes a new environment.
$(PYTHON_STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

# pip is not silenced: a first download takes minutes, and it shows them.
$(DEMO_STAMP): $(PYTHON_STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[demo]"
	touch $@

$(STAMP): $(PYTHON_STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

# The oldest TensorBoard imports six, and does not say so.
$(OLDEST)/.installed: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[test]" six
	touch $@
