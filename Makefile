# `make demo` and `make test` need nothing but Python 3.11 or newer; they keep what they install in .venv.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test soak bench clean

demo: .venv/.examples
	$(BIN)/python examples/custom_loop.py

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist worksteal

soak: .venv/.dev
	RESUME_KILLS=200 $(BIN)/pytest -q -n 2 tests/loop/test_resume.py -k killed_at_random

bench: .venv/.bench
	$(BIN)/python benchmarks/partition.py
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/checkpoint.py --leave-a-core

# One stamp an extra: made anew when pyproject.toml is newer than what is installed.
.venv/.%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "functrain needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
