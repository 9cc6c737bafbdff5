# `make demo` and `make test` set everything up by themselves on a machine with Python 3.11 (venv and pip).
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup models demo test slow check bench docs clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt "torch==2.13.0"
	$(PIP) install -c constraints.txt -e ".[test,check]"
	touch $@

models: setup
	$(BIN)/luthier fetch smollm2
	$(BIN)/luthier fetch minilm

demo: models
	$(BIN)/luthier demo

test: models
	$(BIN)/python -m pytest

slow: models
	$(BIN)/python -m pytest -m slow
	$(BIN)/luthier matrix

check: setup
	$(BIN)/ruff check luthier tests
	$(BIN)/mypy

bench: models
	$(BIN)/python -m bench

docs: setup
	$(BIN)/python -m luthier.report.pages docs/methods

clean:
	rm -rf .venv build dist *.egg-info
