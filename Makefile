# Everything runs from a fresh clone with only Python 3.11+ and pip.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# The newest Python there is, for the newest of everything.
NEWEST ?= $(lastword $(sort $(foreach minor,3.13 3.14,$(shell command -v python$(minor))) $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python)))

.PHONY: setup demo test test-fast test-full fuzz newest test-newest test-flax wheel lint docs base judges pretrain pretrain-fish evaluate bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $(STAMP)

.venv/.tested: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	touch .venv/.tested

demo: setup ## personalise six creatures from one picture each; look at outputs/demo/grid.png
	$(BIN)/e4t demo

test: .venv/.tested ## the tests, 12 to 13 minutes on two cores
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: .venv/.tested ## those that compile little, ≤ 90 seconds
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not compiles"

test-full: .venv/.tested ## the slow ones too
	$(BIN)/python -m pytest -m "slow or not slow"

fuzz: .venv/.tested ## odd inputs, damaged files and killed runs for as long as it takes, other ones every time
	E4T_FUZZ=20 $(BIN)/python -m pytest --timeout 36000 -m "slow or not slow" \
		tests/test_fuzz.py tests/test_storage.py tests/training/test_checkpoints.py tests/training/test_killed_runs.py
	$(BIN)/python tests/helpers/odd_inputs.py $$(date +%s)

newest: ## print the newest Python there is, 3.13 or later
	@test -n "$(NEWEST)" || { echo "No Python 3.13 was found; name one: make test-newest NEWEST=python3.13" >&2; exit 1; }
	@echo "$(NEWEST)"

test-newest: newest ## the tests without pins and without PyTorch, on that Python: what a user installs today; FAST=1: what compiles little
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e ".[test-newest]"
	.venv-newest/bin/python -m pip check
	.venv-newest/bin/python -m pytest $(PARALLEL) $(if $(FAST),-m "not slow and not compiles")

test-flax: ## the last Flax classes of diffusers and transformers as witnesses, in an environment of their own
	$(PYTHON) -m venv .venv-flax
	grep -vE "^(diffusers|transformers|tokenizers|huggingface_hub)==" constraints.txt > .venv-flax/constraints.txt
	.venv-flax/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-flax/constraints.txt -e ".[test-flax]"
	.venv-flax/bin/python -m pytest tests/flax_witness

wheel: setup ## build the package, install it elsewhere, use it from an empty folder
	rm -rf build dist .venv-wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/e4t_jax-*.whl
	.venv-wheel/bin/python tests/helpers/installed.py

lint: .venv/.tested ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv-docs/.installed ## documents and API pages as a site, build/site/index.html; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

# The extra alone, without the package: no page needs it imported.
.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch .venv-docs/.installed

base: setup ## train the embedded world's base model from scratch
	$(BIN)/e4t train-base --out e4t_jax/creatures/assets/base

judges: setup ## train the embedded world's judges
	$(BIN)/e4t train-judges --out e4t_jax/creatures/assets/judges

pretrain: setup ## pretrain the domain "creatures" on that base
	$(BIN)/e4t pretrain --out e4t_jax/creatures/assets/creatures --resume \
		--steps 5000 --batch-size 64 --regularisation 2.73e-4 --clip-features tokens

pretrain-fish: setup ## pretrain a second domain by the same recipe, in half an hour: fish, in outputs/fish; then e4t evaluate --domain outputs/fish
	$(BIN)/e4t pretrain --data fish --out outputs/fish --resume \
		--steps 6000 --batch-size 32 --regularisation 4.98e-4 --clip-features tokens

bench: .venv/.tested ## how fast concepts are tuned, and beside plain PyTorch; a quiet machine, some ten minutes
	$(BIN)/python benchmarks/tuning.py
	$(BIN)/python benchmarks/versus_pytorch.py

evaluate: setup ## measure five steps on 64 held-out creatures
	$(BIN)/e4t evaluate

clean:
	rm -rf .venv .venv-newest .venv-wheel .venv-docs .venv-flax outputs build dist *.egg-info
