# make setup | demo | demo-real | test | test-all | test-gpu | lint | format | docs | package
# VENV is where everything is installed; nothing outside it is touched.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.te_dynamo

# Installed first and named again with the rest, so that no later resolution replaces it.
TORCH ?= torch==2.13.0

# Errors only: some machines' pip settings cause a warning for each package.
PIP := $(PY) -m pip -qq --disable-pip-version-check

# The tests need Transformer Engine's Python package without its libraries. It cannot be imported then, and peft (so transformers'
# Trainer too) imports it where it is installed. This variable of its own, set as the interpreter starts, lets it be; its warning about
# that, which peft would show to everyone, is silenced.
QUIET := warnings.filterwarnings('ignore', 'Detected a PyTorch installation but could not find', RuntimeWarning)
BARE_TE := import importlib.util, os, warnings; importlib.util.find_spec('transformer_engine_torch') or (os.environ.setdefault('NVTE_PROJECT_BUILDING', '1'), $(QUIET))

.PHONY: setup demo demo-real test test-all test-gpu lint format docs package
setup: $(INSTALLED)
ifneq ($(filter setup,$(MAKECMDGOALS)),)
	@echo "te_dynamo is installed in $(VENV). Next: make demo (minutes), or: $(PY) -m te_dynamo doctor"
endif

$(INSTALLED): pyproject.toml
	@echo "[1/3] $(VENV): a virtual environment"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] $(TORCH): the largest download, minutes without a cache"
	@$(PIP) install "$(TORCH)"
	@echo "[3/3] te_dynamo, and what its examples, tests and docs need: a minute or two"
	@$(PIP) install --editable ".[dev]" "$(TORCH)"
	@echo "$(BARE_TE)" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/te_dynamo_dev.pth"
	@touch $@

demo: setup
	$(PY) examples/demo.py $(ARGS)

demo-real: setup
	TQDM_DISABLE=1 $(PY) examples/real_model.py $(ARGS)

# One thread a worker: the tests are small, and two pools of threads on the same cores slow each other down. Bytecode is kept whatever the
# environment says, since tests start processes.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

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

docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

package: setup
	$(PY) -m tools.package $(ARGS)
