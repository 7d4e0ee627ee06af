# `make train` and `make test` work on a bare machine with Python 3.11; set-up is done once and again when pyproject.toml changes.
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
PY := .venv/bin/python

.PHONY: setup train test test-all test-docs lint reference clean

setup: .venv/.dev

train: .venv/.core
	$(PY) scripts/train.py --config configs/default.yaml

test: setup
	$(PY) -m pytest tests/

test-all: setup
	$(PY) -m pytest tests/ -m ''

# The commands of README and docs as they stand, training at the smoke config's sizes, and the adapters.
test-docs: .venv/.all
	$(PY) -m pytest tests/test_docs.py tests/adapters -m '' --dist worksteal

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/codespell
	.venv/bin/lint-imports
	.venv/bin/pyright

reference: .venv/.core
	$(PY) docs/make_reference.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache .coverage htmlcov
	find . -name __pycache__ -prune -exec rm -rf {} +

# PyTorch goes first, and only if there is none: a build chosen by hand (CUDA, ROCm) stays.
.venv/.core: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable .
	@touch $@

.venv/.all: .venv/.dev
	$(PY) -m pip install --quiet --editable ".[diffusers,trl,track,eval]"
	@touch $@

.venv/.dev: .venv/.core
	$(PY) -m pip install --quiet --editable ".[dev]"
	@touch $@
