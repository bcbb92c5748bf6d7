# Everything runs from a fresh clone with only Python 3.11+ and pip.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-full lint base judges pretrain evaluate clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $(STAMP)

.venv/.tested: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	touch .venv/.tested

demo: setup ## personalise six creatures from one picture each; look at outputs/demo/grid.png
	$(BIN)/python -m infer.demo

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

pretrain: setup ## pretrain the domain "creatures" on that base
	$(BIN)/python -m train.pretrain --out e4t_jax/world/assets/creatures

evaluate: setup ## measure five steps on 64 held-out creatures
	$(BIN)/python -m infer.evaluate

clean:
	rm -rf .venv outputs build *.egg-info
