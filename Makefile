# Everything runs from a fresh clone with only Python 3.11+ and pip.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup test test-full lint base judges clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $(STAMP)

.venv/.tested: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	touch .venv/.tested

test: .venv/.tested ## the tests, ≤ 20 minutes on two cores
	$(BIN)/python -m pytest -n 2

test-full: .venv/.tested ## the slow ones too
	$(BIN)/python -m pytest -m "slow or not slow"

lint: .venv/.tested ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

base: setup ## train the embedded world's base model from scratch
	$(BIN)/python -m train.base

judges: setup ## train the embedded world's judges
	$(BIN)/python -m train.judges

clean:
	rm -rf .venv outputs build *.egg-info
