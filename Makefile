# `make demo` and `make test` need Python 3.11 or later, pip and make; everything else goes into .venv.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The first interpreter that is new enough; `make PYTHON=/path/to/python ...` takes another.
PYTHON ?= $(shell for python in python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
TORCH := $(shell grep '^torch==' constraints.txt)

# Several test processes beside each other: one torch thread for each, or they slow one another down.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

help:
	@echo 'make demo      train a small pair, harden it, show what changed (sets up .venv)'
	@echo 'make test      the tests, without network and accelerator (sets up .venv)'
	@echo 'make test-all  the slow tests as well'
	@echo 'make lint      ruff, pyrefly, import-linter'
	@echo 'make clean     remove .venv, what the demo wrote, builds and caches'

demo: $(VENV)/.ready-run
	$(BIN)/lox-hf demo

test: $(VENV)/.ready-dev
	$(PYTEST)

test-all: $(VENV)/.ready-dev
	$(PYTEST) -m 'not gpu'

lint: $(VENV)/.ready-dev
	@status=0; \
	for check in 'ruff check .' 'pyrefly check --python-interpreter-path $(BIN)/python' 'lint-imports'; do \
		echo "$$check"; $(BIN)/$$check || status=1; \
	done; exit $$status

clean:
	rm -rf $(VENV) lox-demo hardened aligned-lox build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is written last, so an interrupted installation is taken up again.
$(VENV)/.ready-dev: $(VENV)/.ready-run
	@echo 'Installing the tools for tests and lint ...'
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.ready-run: pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or later is needed; none was found on PATH.' >&2; exit 1; }
	@echo 'Installing torch and the package into $(VENV) ...'
	@test -x $(BIN)/python && $(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(PIP) install '$(TORCH)'
	$(PIP) install -c constraints.txt -e '.[peft,eval,trl,plot]'
	@touch $@
