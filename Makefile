# `make demo` and `make test` need nothing but Python 3.11 or newer; they keep what they install in .venv.
#
#   make test              everything: lint, types, all tests. What to run before a change is handed on.
#   make check ROOM=optim  in half a minute: lint, types, and of one room (tree, mesh, gradients, optim, update,
#                          auditing, planning, loop, cli) the examples in its docstrings and its tests, without those
#                          that are marked slow.
#   make soak, make bench  all cases of all tests, runs attacked at every operation on files; what things cost.
PYTHON ?= python3
BIN = .venv/bin
ROOM ?= tree
# A test may take as long as it takes.
LONG = $(BIN)/pytest -q -o faulthandler_timeout=0

.PHONY: demo test check lint soak bench clean

demo: .venv/.examples
	$(BIN)/python examples/custom_loop.py

# A third worker fills the time in which a test waits for a process.
test: lint
	$(BIN)/pytest -q -n 3 --dist worksteal

check: lint
	$(BIN)/pytest -q -n 2 --dist worksteal -m "not slow" functrain/$(ROOM) tests/$(ROOM)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: .venv/.dev
	SOAK=100 $(LONG) -n 2 tests/loop/test_resume.py -k "killed_at_random or phases_killed"
	$(BIN)/python tests/attack --most 500
	-$(BIN)/python tests/attack --most 100 --orbax
	SOAK=20 $(LONG) -n 2 tests/optim/test_multi_transform.py tests/auditing/test_audit.py \
	  tests/gradients/test_routes.py
	SOAK=20 $(LONG) -n 2 tests/optim/test_optax_own.py tests/optim/test_all_of_optax.py
	SOAK=50 $(LONG) -s tests/loop/checkpoint/test_remote_kills.py -k again_and_again
	SOAK=20 $(LONG) -n 2 tests/update/test_extra_arguments.py tests/loop/test_waiting.py
	SOAK=2 $(LONG) -n 2 tests
	SOAK=20 $(LONG) tests/loop/test_processes.py tests/loop/test_layouts_over_processes.py

bench: .venv/.bench
	$(BIN)/python benchmarks/partition.py
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/record.py
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
