# Two commands set everything up and run it: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# implicit warns (and warnings are errors in the tests) unless OpenBLAS keeps to one thread; its own threads do the work.
export OPENBLAS_NUM_THREADS ?= 1
# Tokenizers would warn in every process that is forked after their threads have started.
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo install test lint types check clean

demo: install  ## install, then the whole road on ml-100k
	$(BIN)/recllm quickstart

install: $(INSTALLED)  ## the virtual environment in .venv; instant when nothing has changed

# The stamp is written last, so an installation that was interrupted is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[gpu,train,tune,index,dev]"
	@touch $@

# Two processes of one thread each: half the time of one after the other, on two cores.
test: install  ## all tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# One after the other, also under `make -j`: the last lines must be those of the tests.
check: install  ## what a change has to pass
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory types
	$(MAKE) --no-print-directory test

clean:  ## the environment, caches and builds; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
	find recllm tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
