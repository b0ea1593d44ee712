# make setup | demo | demo-real | test | test-all | test-gpu | lint | format
# VENV is where everything is installed; nothing outside it is touched.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.te_dynamo

# Installed first and named again with the rest, so that no later resolution replaces it.
TORCH ?= torch==2.13.0

.PHONY: setup demo demo-real test test-all test-gpu lint format
setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[dev]" "$(TORCH)"
	@touch $@

demo: setup
	$(PY) examples/demo.py $(ARGS)

demo-real: setup
	TQDM_DISABLE=1 $(PY) examples/real_model.py $(ARGS)

# One thread a worker: the tests are small, and two pools of threads on the same cores slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

test: setup
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: setup
	$(PYTEST) -m "not gpu" $(ARGS)

# In one process, which has the device to itself.
test-gpu: setup
	$(PY) -m pytest -m gpu -rs $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
