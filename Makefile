# Each target does its own set-up; a second call reuses .venv. PYTHON= chooses the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint bench browser clean help

help:
	@echo "make demo     see the whole product work on real images, then open TensorBoard"
	@echo "make test     run the tests"
	@echo "make lint     ruff and mypy"
	@echo "make browser  install a Chromium, without which the tests that open pages are skipped"
	@echo "make bench    run the benchmarks and write their tables"
	@echo "make clean    remove the environment and everything that was generated"

demo: $(STAMP)
	$(BIN)/gradguard demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@
