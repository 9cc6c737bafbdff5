# `make demo`, `make test` and `make docs` set everything up by themselves on a machine with Python 3.11 (venv and pip).
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export NO_MKDOCS_2_WARNING ?= 1

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadscope

slow: models
	$(BIN)/python -m pytest -m slow
	$(BIN)/luthier matrix

check: setup
	$(BIN)/ruff check luthier tests bench
	$(BIN)/mypy

bench: models
	$(BIN)/python -m bench

docs: .venv/.docs
	$(BIN)/python -m luthier.report.pages build/docs
	$(BIN)/mkdocs build -q --strict
	$(BIN)/python -m luthier.report.atlas_links site

.venv/.docs: .venv/.ready
	$(PIP) install -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info
